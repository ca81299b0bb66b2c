"""Shares a vector out in small blocks, one part after another, so that all parts look alike."""

from __future__ import annotations

import numpy as np


class Cyclic:
    """Block b of a vector belongs to part b modulo `parts`. All methods are local.

    Large entries crowd in some layers: contiguous parts would get very different numbers of them.

    Args:
        n: Length of the vector.
        parts: Number of parts.
        block: Entries per block; by default so many that each part has some 16 blocks or more, at
            most 1024.
    """

    def __init__(self, n: int, parts: int, block: int | None = None) -> None:
        if block is None:
            block = 1 << max(0, min(10, (n // (16 * parts)).bit_length() - 1))
        self.n, self.parts, self.block = n, parts, block

    def length(self, part: int) -> int:
        """Entries of a part."""
        rounds, rest = divmod(self.n, self.block * self.parts)
        return rounds * self.block + min(max(rest - part * self.block, 0), self.block)

    def part_of(self, indices: np.ndarray) -> np.ndarray:
        """The part of each entry."""
        return indices // self.block % self.parts

    def inside(self, indices: np.ndarray) -> np.ndarray:
        """The position of each entry within its part; ascends with the entries of a part."""
        positions: np.ndarray = indices // (self.block * self.parts) * self.block
        positions += indices % self.block
        return positions

    def outside(self, part: int, positions: np.ndarray) -> np.ndarray:
        """The entries that lie at these positions of a part."""
        rounds, offsets = np.divmod(positions, self.block)
        return (rounds * self.parts + part) * self.block + offsets
