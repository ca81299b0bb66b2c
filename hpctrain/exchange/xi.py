"""Measures the assumption under which top-k exchange converges, at run time.

    xi = || TopK(sum_m acc_m) - update || / || sum_m lr d_m ||

with acc_m the accumulated vector of party m, d_m its fresh direction, and update what the exchange
applied: sum_m TopK(acc_m) for `gather`. Alistarh et al. 2018 (arXiv 1809.10505, assumption 1) ask
for a small constant xi at every step; sums in place of means leave it as it is. The norms are over
all parameters that are not summed whole, TopK is taken per shard, as the exchange does it.

Cost: two dense all-reduces and three vectors, on the steps that measure.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from hpctrain.compress.feedback_device import AnyFeedback
from hpctrain.compress.select import Selector
from hpctrain.exchange.parties import Agreed
from hpctrain.exchange.shard import Sparse
from hpctrain.transport.communicator import Communicator, Handle


def measured(
    sparse: Sparse,
    feedback: AnyFeedback,
    selector: Selector,
    phases: Sequence[Communicator],
    *,
    step: int,
    bucket: int,
    count: int,
    wanted: int,
    measure: bool,
) -> Generator[Handle, None, tuple[Agreed, float, float]]:
    """Collective over the parties. Run a sparse exchange, and measure around it.

    Args:
        sparse: The exchange of one shard.
        feedback: This rank's, of that shard.
        selector: Of vectors of this length.
        phases: Communicators of the exchange.
        step: Number of the step.
        bucket: Number of the bucket.
        count: Entries that each party sends.
        wanted: Entries that this party wants to send.
        measure: Whether to measure.

    Returns:
        What the exchange returned, and the squares of xi's numerator and denominator in this shard,
        0 where they were not measured.
    """
    exchange = sparse.exchange(step, bucket, feedback, selector, wanted, phases)
    if not measure:
        return (yield from exchange), 0.0, 0.0
    # Whether this party's numbers are finite must not decide: all take part in the reductions.
    feedback.prepare_all()
    total = feedback.total().copy()
    fresh = total - feedback.stored()[0].cpu().numpy()
    for vector in (total, fresh):
        phases[-1].allreduce(vector)
    outcome = yield from exchange
    error = np.zeros_like(total)
    if outcome.finite:
        best = selector.pick(total, count)
        error[best.indices_K] = best.values_K
        for indices, values in sparse.results(step, bucket):
            error[indices] -= values
    return outcome, float(np.dot(error, error)), float(np.dot(fresh, fresh))
