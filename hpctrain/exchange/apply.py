"""Brings the results of a top-k exchange into the parameters or into the gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from hpctrain.exchange.shard import Shard


class Target:
    """What the results change: parameters that they are subtracted from, or a gradient. Local.

    Args:
        vector_P: A flat vector on any device.
        gives: "update": subtract; "gradient": overwrite, with zeros where nothing was sent.
    """

    def __init__(self, vector_P: torch.Tensor, gives: Literal["update", "gradient"]) -> None:
        self._vector_P, self._subtracts = vector_P, gives == "update"
        self._host_P = vector_P.numpy() if vector_P.device.type == "cpu" else None

    def take_sum(self, start: int, stop: int, sum_N: np.ndarray) -> None:
        """Entries [start, stop) take their whole sum."""
        values = torch.from_numpy(sum_N).to(self._vector_P.device)
        part = self._vector_P[start:stop]
        if self._subtracts:
            part.sub_(values)
        else:
            part.copy_(values)

    def clear(self, start: int, stop: int) -> None:
        """Entries [start, stop) are about to take picked entries."""
        if not self._subtracts:
            self._vector_P[start:stop] = 0.0

    def take(self, start: int, indices_K: np.ndarray, values_K: np.ndarray) -> None:
        """Take values at positions that count from `start` and are all different."""
        if self._host_P is None:
            device = self._vector_P.device
            where, values = torch.from_numpy(indices_K + start), torch.from_numpy(values_K)
            sign = -1 if self._subtracts else 1
            self._vector_P.index_add_(0, where.to(device), values.to(device), alpha=sign)
        elif self._subtracts:
            self._host_P[start:][indices_K] -= values_K
        else:
            self._host_P[start:][indices_K] += values_K


def apply_results(
    target: Target, by_bucket: Sequence[Sequence[Shard]], whole: Sequence[bool], step: int
) -> list[float]:
    """Bring the sums over parties into the target, in place. Local.

    Costs one addition per sent entry where updates are subtracted, not per parameter.

    Args:
        target: Parameters or gradient.
        by_bucket: All shards.
        whole: Which buckets were summed whole.
        step: Of the exchange.

    Returns:
        Seconds per bucket.
    """
    seconds = []
    for bucket, shards in enumerate(by_bucket):
        began = time.perf_counter()
        for shard in shards:
            start, stop = shard.plan.start, shard.plan.stop
            if whole[bucket] or shard.sparse is None:
                target.take_sum(start, stop, shard.sum_N)
                continue
            target.clear(start, stop)
            for indices, values in shard.sparse.results(step, bucket):
                target.take(start, indices, values)
        seconds.append(time.perf_counter() - began)
    return seconds
