"""Random sketches of gradients, for runs in which no rank ever holds the mean gradient.

    (S g)_c = sum over i = c mod m of sign_i g_i,     sign_i = +-1, fresh for every sketch

S is linear and E |S g|² = |g|², so that with every group's sketch in place of its gradient the
estimators of `stats.noise` stay unbiased: one all-reduce of m + 3 numbers brings them to all ranks.
It starts at one sketch and ends at the next, so that no rank waits for another.

Signs are drawn for 2^17 entries only. Every 2^16 entries of the vector, a chunk, take theirs from a
random place among these and all turn with one more sign. Within a chunk they are independent; two
chunks share some of them at most in random places, and their common sign keeps E sign_i sign_j = 0.

Source: Alon, Matias, Szegedy 1999 (the sign sketch of a second moment); Charikar, Chen,
Farach-Colton 2002 (its buckets; here a position's bucket is fixed and only the signs are random).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpctrain.stats.noise import GroupSums
from hpctrain.transport.communicator import Communicator, Handle

SIZE = 1024
"""m: the numbers in a sketch. A gradient whose noise spreads over more directions looks as if it
spread over m."""
_CHUNK = 64 * SIZE
"""Entries that take their signs together."""


class Sketch:
    """The sketch of one vector, taken in piece by piece, however it is cut. Local.

    Args:
        seed: Of the signs; equal on all ranks.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._signs = torch.empty(0)
        self.sums_M: Tensor | None = None

    def add(self, start: int, part_N: Tensor) -> None:
        """Take in entries [start, start + N) of the vector."""
        if self.sums_M is None:
            self.sums_M = torch.zeros(SIZE, dtype=torch.float64, device=part_N.device)
            self._signs = self._draw(self._seed, 2 * _CHUNK, 2).to(part_N) * 2 - 1
        stop = start + len(part_N)
        for chunk in range(start // _CHUNK, -(-stop // _CHUNK)):
            first = chunk * _CHUNK
            low, high = max(first, start), min(first + _CHUNK, stop)
            sign, shift = self._turn(chunk)
            signs = self._signs[shift + low - first : shift + high - first]
            signed = part_N[low - start : high - start] * signs
            if high - low < _CHUNK:
                signed = F.pad(signed, (low - first, first + _CHUNK - high))
            self.sums_M += sign * signed.view(-1, SIZE).sum(0)

    def _turn(self, chunk: int) -> tuple[int, int]:
        """A sign for the whole chunk, and where its own signs begin."""
        drawn = int(self._draw(self._seed * 1_000_003 + chunk + 1, 1, 2 * _CHUNK))
        return 2 * (drawn // _CHUNK) - 1, drawn % _CHUNK

    @staticmethod
    def _draw(seed: int, count: int, below: int) -> Tensor:
        random = torch.Generator()
        random.manual_seed(seed % 2**63)
        return torch.randint(0, below, (count,), generator=random)

    def numpy(self) -> np.ndarray:
        """(m,) float64. Local."""
        assert self.sums_M is not None, "no part was added"
        return self.sums_M.cpu().numpy()


class Sketches:
    """Sums the sketches of all ranks. Collective to make.

    Args:
        comm: All ranks; its duplicate carries nothing else.
    """

    def __init__(self, comm: Communicator) -> None:
        duplicate = comm.split(0, comm.rank)
        assert duplicate is not None
        self._comm = duplicate
        self._message = np.zeros(SIZE + 3)
        self._handle: Handle | None = None

    def start(self, sketch: Sketch, batch_replica: int, batch_local: int) -> None:
        """Collective. Send this rank's sketch without waiting; `drain` comes first.

        Args:
            sketch: Of the sum of this rank's gradients over batch_replica.
            batch_replica: What that sum was divided by.
            batch_local: Samples in it; may be 0.
        """
        assert self._handle is None, "an earlier sketch is under way"
        self._message[:] = 0.0
        if batch_local:
            sum_M = sketch.numpy() * batch_replica
            self._message[:3] = 1.0, batch_local, sum_M @ sum_M / batch_local
            self._message[3:] = sum_M
        self._handle = self._comm.iallreduce(self._message)

    def drain(self) -> GroupSums | None:
        """Collective. The sums of the sketch under way; None where there is none."""
        if self._handle is None:
            return None
        self._handle.wait()
        self._handle = None
        groups, samples, weighted_sq = self._message[:3].tolist()
        if not samples:
            return None
        sum_M = self._message[3:]
        return GroupSums(groups, samples, weighted_sq, float(sum_M @ sum_M) / samples**2)
