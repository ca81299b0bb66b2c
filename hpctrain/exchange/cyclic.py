"""Shares a vector out in small blocks, one part after another, so that all parts look alike."""

from __future__ import annotations

import numpy as np


class Cyclic:
    """Block b of a vector belongs to part b modulo `parts`. All methods are local.

    Large entries crowd in some layers: contiguous parts would get very different numbers of them.
    A block's length is a power of two, because shifts are much faster than divisions.

    Args:
        n: Length of the vector.
        parts: Number of parts.
    """

    def __init__(self, n: int, parts: int) -> None:
        # Each part has some 16 blocks or more, but none is longer than 1024.
        self._bits = max(0, min(10, (n // (16 * parts)).bit_length() - 1))
        self.n, self.parts, self.block = n, parts, 1 << self._bits

    def length(self, part: int) -> int:
        """Entries of a part."""
        rounds, rest = divmod(self.n, self.block * self.parts)
        return rounds * self.block + min(max(rest - part * self.block, 0), self.block)

    def by_part(self, indices_K: np.ndarray) -> list[np.ndarray]:
        """Which of these ascending entries belong to each part, as places in `indices_K`.

        Entries of a block are neighbours, so whole blocks are brought into order, not entries.
        """
        rounds = -(-self.n // (self.block * self.parts))
        counts_RP = np.bincount(indices_K >> self._bits, minlength=rounds * self.parts)
        counts_RP = counts_RP.reshape(rounds, self.parts)
        first_RP = np.cumsum(counts_RP).reshape(counts_RP.shape) - counts_RP
        counts, first = counts_RP.T.ravel(), first_RP.T.ravel()
        places = np.repeat(first - (np.cumsum(counts) - counts), counts)
        places += np.arange(len(indices_K))
        return np.split(places, np.cumsum(counts_RP.sum(axis=0))[:-1])

    def inside(self, indices_K: np.ndarray) -> np.ndarray:
        """The position of each entry within its part; ascends with the entries of a part."""
        positions: np.ndarray = (indices_K >> self._bits) // self.parts << self._bits
        positions |= indices_K & (self.block - 1)
        return positions

    def outside(self, part: int, positions_K: np.ndarray) -> np.ndarray:
        """The entries that lie at these positions of a part."""
        indices: np.ndarray = (positions_K >> self._bits) * self.parts + part << self._bits
        indices |= positions_K & (self.block - 1)
        return indices
