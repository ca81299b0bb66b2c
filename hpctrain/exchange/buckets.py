"""Fixed gradient buckets: contiguous slices of the flat gradient in reverse parameter order.

The backward pass finishes gradients from the last layer to the first, so bucket 0 holds the last
parameters and can start while earlier layers still compute. Buckets depend on the model and the
bucket size alone: equal on all ranks, never rebuilt, so that sums are reproducible bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """Entries [start, stop) of the flat gradient: `parameters` are positions in model order."""

    index: int
    start: int
    stop: int
    parameters: tuple[int, ...]
    name: str
    """Its first and last parameter as backward reaches them, for messages."""


def make_buckets(
    names: Sequence[str], sizes: Sequence[int], itemsize: int, bucket_bytes: int
) -> list[Bucket]:
    """Cut the flat gradient into buckets of at most `bucket_bytes`. Local.

    A parameter larger than a bucket has a bucket of its own; parameters are never split.

    Args:
        names: Parameter names in model order.
        sizes: Entries of each parameter, same order.
        itemsize: Bytes of one entry.
        bucket_bytes: Upper limit of a bucket with more than one parameter.
    """
    groups: list[list[int]] = []
    room = 0
    for position in reversed(range(len(sizes))):
        nbytes = sizes[position] * itemsize
        if not groups or nbytes > room:
            groups.append([])
            room = bucket_bytes
        groups[-1].append(position)
        room -= nbytes
    buckets = []
    stop = sum(sizes)
    for index, group in enumerate(groups):
        start = stop - sum(sizes[position] for position in group)
        name = names[group[0]] if len(group) == 1 else f"{names[group[0]]}..{names[group[-1]]}"
        buckets.append(Bucket(index, start, stop, tuple(group), name))
        stop = start
    return buckets
