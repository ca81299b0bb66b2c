"""Sums over ranks of values that travel in half precision, as bytes (architecture.md rule 8).

Each rank owns one slice of the vector. All-to-all: every rank sends each slice, rounded to half
precision, to its owner. The owner adds the P contributions in float32, in rank order, and rounds
once. All-gather: the rounded sums go round a ring in rank order. So both directions carry half
precision, every rank ends with the same bits, and a value is rounded twice (once per rank before
the sum, once after), however many ranks there are.

float16 overflows to inf above 65504: scale gradients before the exchange, or use bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from hpctrain.transport.communicator import Communicator, Handle

WireDtype = Literal["native", "float16", "bfloat16"]

TORCH_DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NATIVE = (torch.float32, torch.float64)

_TO_OWNER, _ROUND = 0, 1


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as a uint8 array. Local."""
    return tensor.detach().view(torch.uint8).numpy()


def describe(comm: Communicator, wire_dtype: WireDtype) -> str:
    """What moves the bytes, for people. Local."""
    if wire_dtype == "native":
        return comm.algorithm
    return f"{wire_dtype} bytes: all-to-all, float32 sum in rank order, ring all-gather"


class BucketOrder:
    """Refuses buckets that are not started once per step in index order, or that cannot be summed.

    Args:
        names: one name per bucket.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._next = 0

    def check(self, index: int, bucket: torch.Tensor) -> None:
        """Check a bucket that is about to start. Local.

        Raises:
            ValueError: out of order, or not a contiguous vector of floating-point numbers.
        """
        if index != self._next or index >= len(self.names):
            raise ValueError(
                f"buckets start once per step in the order 0..{len(self.names) - 1}; got {index} "
                f"after {self._next} were started: on another rank the sums would not match"
            )
        if bucket.dim() != 1 or not bucket.is_contiguous() or not bucket.is_floating_point():
            raise ValueError(
                f"bucket {index} ({self.names[index]}) must be a contiguous 1-D floating-point "
                f"tensor; got {bucket.dtype} of shape {tuple(bucket.shape)}"
            )
        self._next += 1

    def restart(self) -> None:
        """Begin the next step. Local."""
        self._next = 0


class BucketSum:
    """Sums CPU buckets over `comm`, in place; the same bits on every rank.

    Args:
        comm: point-to-point messages (tags 0 and 1) and all-reduces of this object only.
        wire_dtype: "native" (float32 or float64, all-reduce), "float16" or "bfloat16".
    """

    def __init__(self, comm: Communicator, wire_dtype: WireDtype) -> None:
        self._comm = comm
        self._wire = TORCH_DTYPES.get(wire_dtype)
        self._half = torch.empty(0, dtype=self._wire)
        self._parts = torch.empty(0, dtype=self._wire)
        self._total = torch.empty(0, dtype=torch.float32)

    def run(self, bucket: torch.Tensor) -> None:
        """Sum a contiguous 1-D CPU tensor over the ranks. Collective. Overwrites `bucket`.

        Raises:
            TypeError: a half-precision bucket with wire_dtype = "native".
        """
        if self._wire is None:
            if bucket.dtype not in NATIVE:
                raise TypeError(
                    f"a {bucket.dtype} bucket cannot be summed natively (float32 and float64 "
                    'can); set exchange.wire_dtype = "bfloat16" or "float16"'
                )
            self._comm.allreduce(bucket.detach().numpy())
        elif self._comm.size == 1:
            bucket.copy_(bucket.to(self._wire))
        elif bucket.dtype == self._wire:
            self._exchange(bucket)
        else:
            if self._half.numel() < bucket.numel():
                self._half = torch.empty(bucket.numel(), dtype=self._wire)
            half = self._half[: bucket.numel()]
            half.copy_(bucket)
            self._exchange(half)
            bucket.copy_(half)

    def _exchange(self, half: torch.Tensor) -> None:
        comm, rank, size = self._comm, self._comm.rank, self._comm.size
        bounds = [half.numel() * part // size for part in range(size + 1)]
        mine = half[bounds[rank] : bounds[rank + 1]]
        slices = [tensor_bytes(half[start:stop]) for start, stop in pairwise(bounds)]
        self._reserve(mine.numel())
        parts = self._parts[: size * mine.numel()].view(size, mine.numel())

        handles: list[Handle] = []
        for step in range(1, size):
            source, dest = (rank - step) % size, (rank + step) % size
            handles.append(comm.irecv(tensor_bytes(parts[source]), source, _TO_OWNER))
            handles.append(comm.isend(slices[dest], dest, _TO_OWNER))
        parts[rank].copy_(mine)
        for handle in handles:
            handle.wait()

        total = self._total[: mine.numel()]
        total.copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        mine.copy_(total)

        successor, predecessor = (rank + 1) % size, (rank - 1) % size
        for step in range(size - 1):
            arriving = comm.irecv(slices[(rank - step - 1) % size], predecessor, _ROUND)
            leaving = comm.isend(slices[(rank - step) % size], successor, _ROUND)
            arriving.wait()
            leaving.wait()

    def _reserve(self, slice_numel: int) -> None:
        if self._total.numel() < slice_numel:
            self._total = torch.empty(slice_numel, dtype=torch.float32)
            self._parts = torch.empty(slice_numel * self._comm.size, dtype=self._wire)
