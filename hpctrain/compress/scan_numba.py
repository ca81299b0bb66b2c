"""The numba form of `scan`. Importing this module compiles it, about a second of one core.

Nothing is cached on disk: ranks that start together would write the same files, and containers
are read-only.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int64, njit, uint8, uint64, uintp

_WORD = 8


@njit(int64(float32[::1], float32, uint8[::1], uint64[::1], int64[::1]), nogil=True)
def _scan(block_B, threshold, mask, words, found):  # type: ignore[no-untyped-def]
    """Positions of what exceeds `threshold` go to `found`; how many. `words` views `mask`."""
    n = uintp(len(block_B))
    for i in range(n):
        # Not "greater": a NaN is neither, and must not pass unseen.
        mask[i] = not abs(block_B[i]) <= threshold
    n_words = (n + uintp(_WORD - 1)) // uintp(_WORD)
    for i in range(n, n_words * uintp(_WORD)):
        mask[i] = 0
    count = uintp(0)
    for word in range(n_words):
        if words[word]:
            # Every position is written and those that count stay: cheaper than eight branches.
            for i in range(word * uintp(_WORD), (word + uintp(1)) * uintp(_WORD)):
                found[count] = i
                count += uintp(mask[i])
    return count


class NumbaScan:
    """Scans blocks of at most `block` entries with compiled code. Local."""

    def __init__(self, block: int) -> None:
        words = -(-block // _WORD)
        self._words = np.zeros(words, np.uint64)
        self._mask = self._words.view(np.uint8)
        # One more, which is written when all that exceed are found.
        self._found = np.empty(words * _WORD + 1, np.int64)

    def __call__(self, block_B: np.ndarray, threshold: float) -> np.ndarray:
        count = _scan(block_B, np.float32(threshold), self._mask, self._words, self._found)
        return self._found[:count]
