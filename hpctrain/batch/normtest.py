"""A batch at which the gradient's noise stays below a fraction of the gradient: the norm test.

    test:      s2 / B <= eta² |g_B|²          passed: the batch stays
    otherwise: B <- ceil(s2 / (eta² |g_B|²)), within the bounds

variant = "average": s2 and mu2 are running averages, and |g_B|² = max(mu2, 0) + s2 / B, what the
squared length of a mean of B gradients is on average. The batch settles where B = (1 - eta²) / eta²
* B_simple, B_simple = s2/mu2; one look multiplies it by 1 / eta² at most.
variant = "ddp": both are of the last measured step alone, s2 from the gradients of the groups (a
rank's, or a micro-batch's) and |g_B|² that of their mean.

The batch never shrinks, as released; may_shrink = true takes the right side of the rule at every
look, also where the test is passed.

Source: Byrd, Chin, Nocedal, Wu 2012, "Sample size selection in optimization methods for machine
learning", Math. Program. 134, equations 3.3 and 3.12 (the test, and the next size); Lau, Li, Xu,
Liu, Kolar 2024, arXiv 2412.21124 (DDP-Norm: the variance between workers' gradients). Differences:
s2 divides by groups - 1, which is unbiased; "average" takes no per-sample gradients; a cap holds.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from hpctrain.batch.looking import LookingPolicy
from hpctrain.batch.planner import noise_facts
from hpctrain.batch.policy import Decision, Facts, Seen
from hpctrain.batch.table import AdaptiveTable, Need
from hpctrain.stats.noise import GroupSums, NoiseEstimate


class NormTest(AdaptiveTable):
    """[batch] kind = "normtest": noise below a fraction of the gradient."""

    kind: Literal["normtest"] = "normtest"
    """The policy."""
    eta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """The noise of a step's gradient is at most this fraction of its length."""
    variant: Literal["average", "ddp"] = "average"
    """By running averages, or by the last step's gradients of ranks and micro-batches."""
    may_shrink: bool = False
    """Follow the test downwards too."""

    @property
    def needs(self) -> frozenset[Need]:
        """Noise. Local."""
        return frozenset({"noise"})

    def build(self) -> NormTestPolicy:
        """The running policy. Local."""
        return NormTestPolicy(self)


class NormTestPolicy(LookingPolicy):
    """Runs the rule at the top of this file.

    Args:
        table: Its configuration.
    """

    def __init__(self, table: NormTest) -> None:
        super().__init__(table)
        self._test = table

    def look(self, seen: Seen) -> Decision:
        """The batch for the steps to come, with a reason. Local."""
        facts: Facts = {**noise_facts(seen.noise), "action": "keep"}
        measured = self._measured(seen.noise, seen.latest)
        if measured is None:
            return self.kept("no step with two groups of samples was measured yet", facts)
        s2, mean_sq = measured
        allowed = self._test.eta**2 * mean_sq
        facts |= {"step_s2": s2, "mean_sq": mean_sq}
        passed = s2 / self.batch <= allowed
        said = f"noise {s2 / self.batch:.3g}, allowed {allowed:.3g}"
        if passed and not self._test.may_shrink:
            return self.kept(f"test passed, {said}", facts)
        wanted = s2 / allowed if allowed > 0.0 else math.inf
        batch = self._table.within(math.ceil(wanted) if math.isfinite(wanted) else math.inf)
        if batch == self.batch:
            return self.kept(f"{'test passed' if passed else 'at its bound'}, {said}", facts)
        facts["action"] = "grow" if batch > self.batch else "shrink"
        return self.moved(batch, said, facts)

    def _measured(
        self, noise: NoiseEstimate | None, latest: GroupSums | None
    ) -> tuple[float, float] | None:
        """(s2, |g_B|²) by the variant; None where it is not known."""
        if self._test.variant == "average":
            if noise is None:
                return None
            return noise.s2, max(noise.mu2, 0.0) + noise.s2 / self.batch
        if latest is None or latest.groups < 2:
            return None
        return max(latest.moments()[0], 0.0), latest.mean_sq
