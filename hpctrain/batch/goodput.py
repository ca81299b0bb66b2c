"""The batch that makes the most progress per second, by measured noise and measured step times.

At every look, with B the present batch and B_S = 1 + noise_scale_factor * (b_s - 1):

    B*        = sqrt(B_half * (B_S - 1)),  B_half = fixed_s / per_sample_s
    candidate = of batch_global * 2^k within [B/2, 4 B], batch_min, batch_max and, upwards,
                delta * B_S + 1 with delta = 1 / efficiency_floor - 1: that of the largest goodput
    change    if goodput(candidate) / goodput(B) - 1 > min_gain also at the end of the interval of
                B_S that speaks against it: the low end for a larger batch, the high end for a
                smaller one. Where a larger candidate does not pass, the next smaller one is tried.
    shrink    to the next smaller rung, whatever the gain, where even the high end gives B an
                efficiency below `efficiency_floor`

So the estimate says where to, and its interval whether. An estimate that is not resolved says
"B_S is at least low": the batch may grow to what that justifies, and never shrinks by it.

The first look is as soon as noise and times are known and the noise is resolved, or after
`check_every` steps; after a change the next one is `cool_down_steps` steps later at the earliest,
but the first resolved estimate is looked at at once.

Source: Qiao et al. 2021, "Pollux", OSDI: the objective, and a threshold of 5 %. Differences: the
step time is a straight line, so that the best batch has a closed form (hpctrain/batch/planner.py);
decisions fall during an epoch and go both ways; the interval of the estimate and a floor on
efficiency (Yin et al. 2018, arXiv 1706.05699: B <= delta B_S + 1) bound them; batches are powers of
two of the start. `noise_scale_factor` corrects a noise scale that is not the critical batch
(Merrill et al. 2025, arXiv 2505.23971).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpctrain.batch.looking import LookingPolicy
from hpctrain.batch.planner import (
    best_batch,
    efficiency,
    floor_batch,
    goodput,
    in_words,
    ladder,
    noise_facts,
    percent,
    scaled,
)
from hpctrain.batch.policy import Decision, Facts, Seen, StepTimes
from hpctrain.batch.table import AdaptiveTable, Need
from hpctrain.state import State
from hpctrain.stats.noise import NoiseEstimate


class Goodput(AdaptiveTable):
    """[batch] kind = "goodput": most progress per second."""

    kind: Literal["goodput"] = "goodput"
    """The policy."""
    efficiency_floor: float = Field(default=0.25, gt=0.0, lt=1.0)
    """The batch stays where a sample brings at least this fraction of what it brings at batch 1.
    0.5 is the critical batch, at which twice the fewest samples are needed; 0.25 three times it."""
    min_gain: float = Field(default=0.05, ge=0.0)
    """Change only for a larger relative gain in goodput."""
    cool_down_steps: int = Field(default=20, ge=0)
    """Steps without another look after a change."""
    noise_scale_factor: float = Field(default=1.0, gt=0.0)
    """The critical batch is so many times the measured one, as `hpctrain calibrate` finds."""

    @property
    def needs(self) -> frozenset[Need]:
        """Noise and times. Local."""
        return frozenset({"noise", "times"})

    def build(self) -> GoodputPolicy:
        """The running policy. Local."""
        return GoodputPolicy(self)


class GoodputPolicy(LookingPolicy):
    """Runs the rule at the top of this file.

    Args:
        table: Its configuration.
    """

    def __init__(self, table: Goodput) -> None:
        super().__init__(table)
        self._goodput = table
        self._rungs = ladder(table)
        self.resolved = False
        """Whether a resolved estimate was looked at."""

    def due(self, seen: Seen) -> bool:
        """Whether to look before this step. Local."""
        if _trusted(seen) and not self.resolved:
            return True
        wait = self._table.check_every
        if self.changed is not None and self.changed == self.looked:
            wait = max(wait, self._goodput.cool_down_steps)
        return seen.step - self.looked >= wait

    def decide(self, seen: Seen) -> Decision:
        """What the next step takes. Local."""
        decision = super().decide(seen)
        self.resolved = self.resolved or _trusted(seen)
        return decision

    def look(self, seen: Seen) -> Decision:
        """The batch for the steps to come, with a reason. Local; changes nothing."""
        noise, times, batch, least = seen.noise, seen.times, self.batch, self._goodput.min_gain
        facts: Facts = {**noise_facts(noise), "action": "keep"}
        if noise is None:
            return self.kept("the gradient noise is not known yet", facts)
        if times is None:
            return self.kept("the times of a step are not known yet", facts)
        low, point, high = self._believed(noise)
        facts |= _times_facts(point, times) | {"cap": self._cap(point, times)}
        wasteful = batch > floor_batch(high, self._goodput.efficiency_floor)
        smaller = [rung for rung in self._rungs if rung < batch]
        if wasteful and smaller:
            facts |= {"gain": _gain(smaller[-1], batch, point, times), "action": "shrink"}
            share, floor = efficiency(batch, point), self._goodput.efficiency_floor
            why = f"a sample brings {percent(share)}, less than {percent(floor)}"
            return self.moved(smaller[-1], why, facts)
        wanted = self._candidate(point, times)
        tried = [rung for rung in self._rungs if batch < rung <= wanted] or [wanted]
        gains = {rung: _gain(rung, batch, low if rung > batch else high, times) for rung in tried}
        worth = [rung for rung in tried if gains[rung] > least]
        target = max(worth) if worth else max(tried, key=lambda rung: gains[rung])
        facts["gain"] = gains[target]
        believed = in_words(noise)
        if target == batch:
            return self.kept(f"nothing in reach is better ({believed})", facts)
        if not worth:
            why = f"gain {percent(gains[target])} of {target} is below {percent(least)}"
            return self.kept(f"{why} ({believed})", facts)
        facts["action"] = "grow" if target > batch else "shrink"
        why = f"{believed}, half of a step is fixed at {times.b_half:.0f}"
        return self.moved(target, f"{why}: gain {percent(gains[target])}", facts)

    def state(self) -> State:
        """The batch, when it was looked at, and whether the noise was ever resolved. Local."""
        state = super().state()
        state.counters["resolved"] = self.resolved
        return state

    def load_state(self, state: State) -> None:
        """Go on from there, at the nearest batch of the present ladder. Local."""
        super().load_state(state)
        self.batch = max((r for r in self._rungs if r <= self.batch), default=self._rungs[0])
        self.resolved = bool(state.counters.get("resolved"))

    def _believed(self, noise: NoiseEstimate) -> tuple[float, float, float]:
        """Low end, best guess and high end of B_S."""
        point = noise.b_s if noise.resolved else noise.low
        factor = self._goodput.noise_scale_factor
        low, point, high = (max(scaled(b, factor), 1.0) for b in (noise.low, point, noise.high))
        return low, point, high

    def _candidate(self, b_s: float, times: StepTimes) -> int:
        floor = floor_batch(b_s, self._goodput.efficiency_floor)
        reach = [
            rung
            for rung in self._rungs
            if self.batch / 2 <= rung <= 4 * self.batch and rung <= max(floor, self.batch)
        ]
        return max(reach, key=lambda rung: goodput(rung, b_s, times))

    def _cap(self, b_s: float, times: StepTimes) -> str | None:
        """Which bound keeps the batch from B*; None: none does."""
        best = best_batch(b_s, times)
        above = {
            "efficiency_floor": floor_batch(b_s, self._goodput.efficiency_floor),
            "batch_max": self._table.batch_max,
            "4 times": 4 * self.batch,
        }
        below = {"batch_min": self._table.smallest, "half": self.batch / 2}
        name = min(above, key=lambda key: above[key])
        if best > above[name]:
            return name
        name = max(below, key=lambda key: below[key])
        return name if best < below[name] else None


def _trusted(seen: Seen) -> bool:
    return seen.times is not None and seen.noise is not None and seen.noise.resolved


def _gain(target: int, batch: int, b_s: float, times: StepTimes) -> float:
    return goodput(target, b_s, times) / goodput(batch, b_s, times) - 1.0


def _times_facts(b_s: float, times: StepTimes) -> Facts:
    return {
        "fixed_s": times.fixed_s,
        "per_sample_s": times.per_sample_s,
        "b_half": times.b_half,
        "b_star": best_batch(b_s, times),
    }
