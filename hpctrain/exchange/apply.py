"""Brings the results of a top-k exchange into the parameters or into the gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from hpctrain.exchange.shard import Shard


def subtract_results(
    params_P: np.ndarray, by_bucket: Sequence[Sequence[Shard]], whole: Sequence[bool], step: int
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
    seconds = []
    for bucket, shards in enumerate(by_bucket):
        began = time.perf_counter()
        for shard in shards:
            params_N = params_P[shard.plan.start : shard.plan.stop]
            if whole[bucket] or shard.sparse is None:
                params_N -= shard.sum_N
                continue
            for indices, values in shard.sparse.results(step, bucket):
                params_N[indices] -= values
        seconds.append(time.perf_counter() - began)
    return seconds


def add_results(
    grads_P: np.ndarray,
    by_bucket: Sequence[Sequence[Shard]],
    whole: Sequence[bool],
    step: int,
    own: int | None,
) -> list[float]:
    """Overwrite this rank's gradient with the sums over parties, zero where none was sent. Local.

    Args:
        grads_P: The gradient.
        by_bucket: All shards.
        whole: Which buckets were summed whole.
        step: Of the exchange.
        own: This rank's place; sums may be in its gradient already.

    Returns:
        Seconds per bucket.
    """
    seconds = []
    for bucket, shards in enumerate(by_bucket):
        began = time.perf_counter()
        for shard in shards:
            grads_N = grads_P[shard.plan.start : shard.plan.stop]
            if whole[bucket] or shard.sparse is None:
                if shard.place != own or not shard.sparse:
                    grads_N[:] = shard.sum_N
                continue
            grads_N[:] = 0.0
            for indices, values in shard.sparse.results(step, bucket):
                grads_N[indices] += values
        seconds.append(time.perf_counter() - began)
    return seconds
