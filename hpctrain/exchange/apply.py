"""Brings the results of a top-k exchange into the parameters or into the gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from hpctrain.exchange.shard import Shard


class Target:
    """A flat vector on any device, changed in place from numbers on the host. Local.

    Args:
        vector_P: The vector.
        sign: Results are added times this.
    """

    def __init__(self, vector_P: torch.Tensor, sign: int) -> None:
        self._vector_P, self._sign = vector_P, sign
        self._host_P = vector_P.numpy() if vector_P.device.type == "cpu" else None

    def add_at(self, start: int, indices_K: np.ndarray, values_K: np.ndarray) -> None:
        """Add values at positions that count from `start` and are all different."""
        if self._host_P is not None:
            part = self._host_P[start:]
            if self._sign > 0:
                part[indices_K] += values_K
            else:
                part[indices_K] -= values_K
            return
        device = self._vector_P.device
        where, values = torch.from_numpy(indices_K + start), torch.from_numpy(values_K)
        self._vector_P.index_add_(0, where.to(device), values.to(device), alpha=self._sign)

    def add(self, start: int, stop: int, values_N: np.ndarray) -> None:
        """Add to [start, stop)."""
        values = torch.from_numpy(values_N).to(self._vector_P.device)
        self._vector_P[start:stop].add_(values, alpha=self._sign)

    def clear(self, start: int, stop: int) -> None:
        """Zero [start, stop)."""
        self._vector_P[start:stop] = 0.0

    def put(self, start: int, stop: int, values_N: np.ndarray) -> None:
        """Overwrite [start, stop)."""
        self._vector_P[start:stop].copy_(torch.from_numpy(values_N))


def subtract_results(
    params_P: torch.Tensor, by_bucket: Sequence[Sequence[Shard]], whole: Sequence[bool], step: int
) -> list[float]:
    """Subtract the sums over parties from the parameters, in place. Local.

    Costs one addition per sent entry, not per parameter.

    Args:
        params_P: The parameters.
        by_bucket: All shards.
        whole: Which buckets were summed whole.
        step: Of the exchange.

    Returns:
        Seconds per bucket.
    """
    target = Target(params_P, -1)
    seconds = []
    for bucket, shards in enumerate(by_bucket):
        began = time.perf_counter()
        for shard in shards:
            start, stop = shard.plan.start, shard.plan.stop
            if whole[bucket] or shard.sparse is None:
                target.add(start, stop, shard.sum_N)
                continue
            for indices, values in shard.sparse.results(step, bucket):
                target.add_at(start, indices, values)
        seconds.append(time.perf_counter() - began)
    return seconds


def put_results(
    grads_P: torch.Tensor, by_bucket: Sequence[Sequence[Shard]], whole: Sequence[bool], step: int
) -> list[float]:
    """Overwrite this rank's gradient with the sums over parties, zero where none was sent. Local.

    Args:
        grads_P: The gradient.
        by_bucket: All shards.
        whole: Which buckets were summed whole.
        step: Of the exchange.

    Returns:
        Seconds per bucket.
    """
    target = Target(grads_P, 1)
    seconds = []
    for bucket, shards in enumerate(by_bucket):
        began = time.perf_counter()
        for shard in shards:
            start, stop = shard.plan.start, shard.plan.stop
            if whole[bucket] or shard.sparse is None:
                target.put(start, stop, shard.sum_N)
                continue
            target.clear(start, stop)
            for indices, values in shard.sparse.results(step, bucket):
                target.add_at(start, indices, values)
        seconds.append(time.perf_counter() - began)
    return seconds
