"""Brings the results of a top-k exchange into the parameters or into the gradient."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hpctrain.exchange.shard import Shard, Sparse

Result = tuple[int, Shard, Sparse | None]
"""Bucket number, shard, and the sparse exchange that ran (None: everything was summed)."""


def subtract_results(params_P: np.ndarray, results: Iterable[Result], step: int) -> None:
    """Subtract the sums over parties from the parameters, in place. Local.

    Costs one addition per sent entry, not per parameter.
    """
    for bucket, shard, sparse in results:
        params_N = params_P[shard.plan.start : shard.plan.stop]
        if sparse is None:
            params_N -= shard.grad_N
            continue
        for indices, values in sparse.results(step, bucket):
            params_N[indices] -= values


def add_results(grads_P: np.ndarray, results: Iterable[Result], step: int, own: int | None) -> None:
    """Overwrite this rank's gradient with the sums over parties, zero where none was sent. Local.

    Args:
        grads_P: The gradient.
        results: Of all shards.
        step: Of the exchange.
        own: This rank's place, whose sums are in its gradient already.
    """
    for bucket, shard, sparse in results:
        grads_N = grads_P[shard.plan.start : shard.plan.stop]
        if sparse is None:
            if shard.place != own:
                grads_N[:] = shard.grad_N
            continue
        grads_N[:] = 0.0
        for indices, values in sparse.results(step, bucket):
            grads_N[indices] += values
