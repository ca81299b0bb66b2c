"""Picks the k entries of largest magnitude at about the speed of memory.

    t <- a magnitude that about k (1 + margin) entries exceed, from a strided sample
    one pass over blocks that fit the cache: prepare the block, compare with t, collect what exceeds
    trim the collected entries to exactly k

The sample is fresh at every call and starts elsewhere each time, so nothing drifts and no state is
kept. When fewer than k entries exceed t (about one call in 500), the comparison is repeated with a
lower t; the result is the exact top k in every case, the lowest indices first among equals.

Cost, n entries, one core: 3.5 (numba) to 5 (NumPy) times an in-place `r += g` at n = 1e7 and
k = 1 % (benchmarks/selection.py). Memory: 5 (NumPy) or 9 (numba) bytes per entry of a block, and
the collected entries.

The sampled threshold is that of Deep Gradient Compression (Lin et al. 2018, arXiv 1712.01887,
section 5), with two differences: the sample is some 2e4 entries instead of 1 %, and the number of
entries is held exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpctrain.compress.scan import Kernel, chosen, make_scan

BLOCK = 1 << 17


@dataclass(frozen=True)
class Picked:
    """Entries of a vector: positions and values, positions ascending."""

    indices_K: np.ndarray
    """uint32."""
    values_K: np.ndarray
    """float32."""
    finite: bool
    """False: the vector holds inf or NaN, and the entries mean nothing."""


NOTHING = Picked(np.empty(0, np.uint32), np.empty(0, np.float32), finite=True)
"""No entries."""


def whole(start: int, stop: int) -> None:
    """Prepares nothing: the vector is ready as it is."""


class Selector:
    """Picks from vectors of at most `n` entries, with memory allocated once. Local.

    Args:
        n: Most entries of a vector, below 2^32.
        block: Entries per block.
        kernel: What compares and collects; see `scan`.
    """

    def __init__(self, n: int, block: int = BLOCK, kernel: Kernel = "auto") -> None:
        if n >= 1 << 32:
            raise ValueError(f"indices are uint32: at most 2^32 - 1 entries, got {n}")
        self._block = block
        self.kernel = chosen(kernel)
        self._scan = make_scan(self.kernel, min(block, n))
        self._calls = 0

    def pick(
        self,
        x_N: np.ndarray,
        k: int,
        *,
        sample: Callable[[slice], np.ndarray] | None = None,
        prepare: Callable[[int, int], None] = whole,
    ) -> Picked:
        """The min(k, number of non-zeros) entries of `x_N` of largest magnitude. Local.

        Args:
            x_N: float32, contiguous; what `prepare` fills in, if it is given.
            k: Entries to pick, at least 0.
            sample: x_N[where] as it will be after `prepare`, without changing anything; by default
                x_N itself.
            prepare: Called once for each block [start, stop), in order, before it is read.
        """
        n = len(x_N)
        stride = _stride(n, k)
        start = self._calls * 7919 % min(stride, max(n, 1))
        self._calls += 1
        where = slice(start, None, stride)
        if k >= n:
            magnitudes = np.empty(0, np.float32)
        else:
            magnitudes = np.abs(x_N[where] if sample is None else sample(where))
        wanted = k / stride
        wanted += 3.0 * wanted**0.5 + 1.0
        found = self._collect(x_N, _exceeded_by(magnitudes, wanted), prepare)
        while len(found[0]) < k and _exceeded_by(magnitudes, wanted) > 0.0:
            wanted *= 2.0
            found = self._collect(x_N, _exceeded_by(magnitudes, wanted), whole)
        indices, values = found
        picked = Picked(indices.astype(np.uint32), values, bool(np.isfinite(values).all()))
        return largest(picked, k) if picked.finite else picked

    def _collect(
        self, x_N: np.ndarray, threshold: float, prepare: Callable[[int, int], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """All entries of a magnitude above `threshold`, and every inf and NaN."""
        indices, values = [], []
        for start in range(0, len(x_N), self._block):
            stop = min(start + self._block, len(x_N))
            prepare(start, stop)
            block = x_N[start:stop]
            found = self._scan(block, threshold)
            values.append(block.take(found))
            indices.append(found + start)
        if not indices:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        return np.concatenate(indices), np.concatenate(values)


def _stride(n: int, k: int) -> int:
    """Entries between two samples.

    With h of the k largest in the sample the margin is 3 k / sqrt(h) candidates, some 30 ns each,
    and the sample has h n / k entries, some 8 ns each: their sum is least at this h.
    """
    hits = min(max((5.0 * k * k / max(n, 1)) ** (2 / 3), 16.0), 1024.0)
    return max(1, int(k / hits)) | 1


def _exceeded_by(magnitudes: np.ndarray, count: float) -> float:
    """A threshold that about `count` of the sampled magnitudes exceed; 0 where all may."""
    place = len(magnitudes) - int(count) - 1
    if place < 0:
        return 0.0
    threshold = float(np.partition(magnitudes, place)[place])
    return threshold if np.isfinite(threshold) else 0.0


def largest(picked: Picked, k: int) -> Picked:
    """The k of these entries of largest magnitude, the first ones among equals. Local."""
    if len(picked.indices_K) <= k:
        return picked
    magnitudes = np.abs(picked.values_K)
    last = np.partition(magnitudes, -k)[-k] if k else np.inf
    keep = magnitudes > last
    (ties,) = np.nonzero(magnitudes == last)
    keep[ties[: k - np.count_nonzero(keep)]] = True
    (kept,) = np.nonzero(keep)
    return Picked(picked.indices_K.take(kept), picked.values_K.take(kept), picked.finite)
