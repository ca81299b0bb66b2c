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


def buckets_with_small(
    names: Sequence[str],
    sizes: Sequence[int],
    small: Sequence[bool],
    itemsize: int,
    bucket_bytes: int,
) -> list[Bucket]:
    """As `make_buckets`, with all small parameters, which come last, in one last bucket. Local.

    Args:
        names: Parameter names in the order of the flat vector.
        sizes: Entries of each parameter, same order.
        small: Which parameters are small.
        itemsize: Bytes of one entry.
        bucket_bytes: Upper limit of a bucket with more than one large parameter.

    Raises:
        ValueError: a small parameter stands before another one.
    """
    if list(small) != sorted(small):
        raise ValueError("small parameters must come last (FlatModel's `comes_last`)")
    n_large = len(small) - sum(small)
    buckets = make_buckets(names[:n_large], sizes[:n_large], itemsize, bucket_bytes)
    if n_large < len(small):
        positions = tuple(range(n_large, len(small)))
        start, stop = sum(sizes[:n_large]), sum(sizes)
        name = f"{len(positions)} small parameters"
        buckets.append(Bucket(len(buckets), start, stop, positions, name))
    return buckets
