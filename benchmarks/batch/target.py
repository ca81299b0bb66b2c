"""When a training has arrived: a held-out loss, averaged over a span of samples.

With a constant step size the loss of single evaluations goes up and down, the more the larger the
step; a single good one is no arrival. The span is equal for all batches, in samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Point = Sequence[float]
"""(step, samples, loss, ...) of an evaluation."""

FEWEST = 2
"""Evaluations that a level is the mean of, at least."""


def level(curve: Sequence[Point], span: float) -> float:
    """Mean loss of the evaluations in the last `span` samples; inf where they are too few."""
    if len(curve) < FEWEST:
        return float("inf")
    since = curve[-1][1] - span
    recent = [point[2] for point in curve[-FEWEST:]]
    recent += [point[2] for point in curve[:-FEWEST] if point[1] > since]
    return statistics.fmean(recent)


def arrival(curve: Sequence[Point], span: float, target: float) -> tuple[int, int] | None:
    """(steps, samples) at the first evaluation whose level is at most the target."""
    for stop in range(FEWEST, len(curve) + 1):
        if level(curve[:stop], span) <= target:
            return int(curve[stop - 1][0]), int(curve[stop - 1][1])
    return None
