"""A batch at which the gradients of its two halves point the same way by a given cosine.

    cosine = mu2 / (mu2 + 2 s2 / B)         of the mean gradients of two halves of B samples
    at every look: B <- ceil(grow * B) where it is below `target`, else floor(shrink * B),
    within the bounds

The batch settles around B = 2 target / (1 - target) * B_simple, B_simple = s2/mu2, which is 6
B_simple for a target of 0.75. Where the mean gradient is not resolved, mu2 may be negative: that is
below any target. SimiGrad scales the step size with the root of the batch: [lr] kind = "sqrt".

Source: Qin, Rajbhandari, Ruwase, Yan, Yang, He 2021, "SimiGrad", NeurIPS (the rule, 1.1 and 0.9).
Differences: the cosine comes from running averages of s2 and mu2 instead of two halves of one step,
and the batch changes at every look, not at every step; rounding is away from the present batch, so
that small ones move too.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from hpctrain.batch.looking import LookingPolicy
from hpctrain.batch.planner import noise_facts
from hpctrain.batch.policy import Decision, Facts, Seen
from hpctrain.batch.table import AdaptiveTable, Need


class Cosine(AdaptiveTable):
    """[batch] kind = "cosine": two halves of a batch agree by a given cosine."""

    kind: Literal["cosine"] = "cosine"
    """The policy."""
    target: float = Field(default=0.75, gt=0.0, lt=1.0)
    """The cosine to hold."""
    grow: float = Field(default=1.1, gt=1.0)
    """Factor of the batch at a look below it."""
    shrink: float = Field(default=0.9, gt=0.0, lt=1.0)
    """Factor at a look at or above it."""

    @property
    def needs(self) -> frozenset[Need]:
        """Noise. Local."""
        return frozenset({"noise"})

    def build(self) -> CosinePolicy:
        """The running policy. Local."""
        return CosinePolicy(self)


class CosinePolicy(LookingPolicy):
    """Runs the rule at the top of this file.

    Args:
        table: Its configuration.
    """

    def __init__(self, table: Cosine) -> None:
        super().__init__(table)
        self._cosine = table

    def look(self, seen: Seen) -> Decision:
        """The batch for the steps to come, with a reason. Local."""
        noise, table = seen.noise, self._cosine
        facts: Facts = {**noise_facts(noise), "action": "keep"}
        if noise is None:
            return self.kept("the gradient noise is not known yet", facts)
        half_sq = noise.mu2 + 2.0 * noise.s2 / self.batch
        cosine = noise.mu2 / half_sq if half_sq > 0.0 else -1.0
        facts["cosine"] = cosine
        below = cosine < table.target
        factor = table.grow if below else table.shrink
        exact = round(factor * self.batch, 6)  # 1.1 * 100 is 110, not a little more
        batch = table.within(math.ceil(exact) if below else math.floor(exact))
        said = f"cosine {cosine:.2f}, target {table.target:.2f}"
        if batch == self.batch:
            return self.kept(f"{said}, at its bound", facts)
        facts["action"] = "grow" if below else "shrink"
        return self.moved(batch, said, facts)
