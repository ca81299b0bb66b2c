"""Halves the batch for some steps where the training loss stands still, and looks whether it falls.

With a step size in proportion to the batch, the loss that SGD hovers at by noise is the same for
all batches: it goes by lr / B. So where the loss stands still, and falls once batch and step size
are halved, it was not noise that held it up but a step too long for the curvature. Training at such
a step is stable, the parameters swing across the valley, and neither the noise nor a rising loss
(hpctrain/batch/retreat.py) tells. Under rules that leave the step size as it is, a smaller batch
only adds noise, the loss does not fall, and the batch is taken up again.

    stands     over the `WATCHED` last losses, all of the present batch, a straight line does not
               fall by twice the standard error of its slope
    test       `TEST` steps at half the batch, or as many as it takes until `LAST` losses are told
    verdict    the mean of the `LAST` losses of these steps is below that of the `WATCHED` before
               them by `SIGMAS` standard errors or more: the batch stays halved
    again      not before twice as many samples, so that a run has a logarithmic number of tests

Source: Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the edge of
stability", arXiv 2103.00065, for training that neither diverges nor gets on; Mandt, Hoffman, Blei
2017, arXiv 1704.04289, equation 12, for lr / B. The test is this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression, variance

from hpctrain.state import State

WATCHED = 30
TEST = 15
LAST = 10
SIGMAS = 4.0
_AGAIN = 2

Losses = Sequence[tuple[int, float]]
"""(step, loss), oldest first: `Seen.losses`."""


@dataclass
class Plateau:
    """The test under way, and when the next may come. Every method is local."""

    tested: int | None = None
    """The batch that was halved; None while there is no test."""
    level: float = 0.0
    """Mean loss at that batch."""
    error_sq: float = 0.0
    """Squared standard error of it."""
    until: int = 0
    """No test before so many samples have been seen."""

    def stands(self, losses: Losses, since: int, samples: int) -> bool:
        """Whether it is time for a test.

        Args:
            losses: `Seen.losses`.
            since: Steps since the batch was changed.
            samples: Seen so far.
        """
        watched = losses[-WATCHED:]
        if samples < self.until or len(watched) < WATCHED:
            return False
        if watched[0][0] <= watched[-1][0] - since:
            return False
        steps, told = zip(*watched, strict=True)
        line = linear_regression(steps, told)
        rests = [y - line.intercept - line.slope * x for x, y in watched]
        middle = fmean(steps)
        error_sq = sum(r * r for r in rests) / (WATCHED - 2) / sum((x - middle) ** 2 for x in steps)
        return bool(line.slope > -2.0 * error_sq**0.5)

    def begin(self, batch: int, losses: Losses, samples: int) -> int:
        """`batch` is to be tested; its half."""
        told = [loss for _, loss in losses[-WATCHED:]]
        self.level, self.error_sq = fmean(told), variance(told) / len(told)
        self.tested, self.until = batch, _AGAIN * samples
        return batch // 2

    def over(self, losses: Losses, since: int) -> bool:
        """Whether the test that began `since` steps ago has been long enough."""
        told = sum(step > losses[-1][0] - since for step, _ in losses)
        return since >= TEST and told >= LAST

    def fell(self, losses: Losses) -> bool:
        """The verdict, at the end of a test: whether the loss fell."""
        told = [loss for _, loss in losses[-LAST:]]
        self.tested = None
        error_sq = self.error_sq + variance(told) / len(told)
        return bool(fmean(told) < self.level - SIGMAS * error_sq**0.5)

    def state(self) -> State:
        return State(counters=dict(vars(self)))

    def load_state(self, state: State) -> None:
        counters = state.counters
        self.tested = None if counters["tested"] is None else int(counters["tested"])
        self.level, self.error_sq = float(counters["level"] or 0), float(counters["error_sq"] or 0)
        self.until = int(counters["until"] or 0)
