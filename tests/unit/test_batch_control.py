"""What the batch control makes of seconds that ranks have told."""

from __future__ import annotations

from typing import Any, cast

import pytest

from hpctrain.batch.goodput import Goodput
from hpctrain.batch.lr import LrConfig
from hpctrain.batch_control import BatchControl
from hpctrain.clock import Clock
from hpctrain.control import Sums

RANKS = 4


def control(batch: int) -> BatchControl:
    """One whose policy holds a batch and sees the times of steps."""
    made = BatchControl(
        Goodput(batch_global=batch, batch_max=8 * batch),
        LrConfig(base=0.1),
        ranks=RANKS,
        replicas=2,
        flat=cast(Any, None),
        measurement=cast(Any, Unmeasured()),
        census=lambda: 0.0,
    )
    made.next(Clock(10_000, 100_000, None))
    return made


class Unmeasured:
    """Noise is not known yet."""

    form = "off"

    latest = None

    def estimate(self) -> None:
        return None


def told(before: Sums, steps: int, samples: int, step_s: float, sync_s: float = 0.0) -> Sums:
    """All ranks took so many more steps, with a total of so many more samples."""
    return Sums(
        steps_timed=before.steps_timed + RANKS * steps,
        samples_timed=before.samples_timed + samples,
        step_s=before.step_s + RANKS * (steps * step_s + sync_s),
        compute_s=before.compute_s + RANKS * steps * 0.1,
        sync_s=before.sync_s + RANKS * sync_s,
    )


def test_an_interval_with_a_short_last_batch_counts_as_the_decided_one():
    made, sums = control(64), Sums()
    for short in (0, 3, 40):
        sums = told(sums, 16, 16 * 64 - short, 0.15)
        made.hear(1, sums)
    times = made._times.times
    assert times is not None
    assert (times.fixed_s, times.per_sample_s) == pytest.approx((0.05, 0.1 / 64))


def test_rare_meetings_are_part_of_what_every_step_costs():
    """Of 4 intervals one has a meeting of 3.2 s, which is 0.05 s for each of 64 steps."""
    made, sums = control(64), Sums()
    for turn in range(8):
        sums = told(sums, 16, 16 * 64, 0.15, sync_s=3.2 if turn % 4 == 3 else 0.0)
        made.hear(1, sums)
    times = made._times.times
    assert times is not None
    fixed_s = times.fixed_s
    assert 0.05 + 0.02 < fixed_s < 0.05 + 0.06
