"""The batch that makes the most progress per second, by measured noise and measured step times.

At every look, with B the present batch and B_S = 1 + noise_scale_factor * (b_s - 1):

    B*        = sqrt(B_half * (B_S - 1)),  B_half = fixed_s / per_sample_s
    candidate = of batch_global * 2^k within [B/2, 4 B], batch_min, batch_max and, upwards,
                delta * B_S + 1 with delta = 1 / efficiency_floor - 1: that of the largest goodput
    change    if goodput(candidate) / goodput(B) - 1 > min_gain also at the end of the interval of
                B_S that speaks against it: the low end for a larger batch, the high end for a
                smaller one. Where a larger candidate does not pass, the next smaller is tried
    shrink    to the next smaller rung, whatever the gain, where even the high end gives B an
                efficiency below `efficiency_floor`

    retreat   where a growth turns out badly, by the noise or by the training loss: to the batch
                before, and not again before four times as many samples (hpctrain/batch/retreat.py)
    test      where the loss stands still after a growth: half the batch for some steps, and for
                good if that makes the loss fall (hpctrain/batch/plateau.py)

So the estimate says where to, and its interval whether. An estimate that is not resolved says
"B_S is at least low": the batch may grow to what that justifies, and never shrinks by it.

Times of one batch size make B_half too small (hpctrain/batch/times.py). Once in a run, where the
batch would stay and no other size was timed, the next steps take twice as many samples, a trial;
the next look decides as if the batch had not changed, now with a slope.

A look is due `check_every` steps after the last one, and `cool_down_steps` after a change; when the
noise is resolved for the first time and the times are known, the next question is a look.

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

from hpctrain.batch.guard import Guard
from hpctrain.batch.looking import LookingPolicy
from hpctrain.batch.planner import (
    best_batch,
    cap_of,
    floor_batch,
    in_words,
    ladder,
    noise_facts,
    scaled,
    times_facts,
    weigh,
)
from hpctrain.batch.policy import Decision, Facts, Seen, StepTimes
from hpctrain.batch.table import AdaptiveTable, Need
from hpctrain.state import State
from hpctrain.stats.noise import NoiseEstimate


class Goodput(AdaptiveTable):
    """[batch] kind = "goodput": most progress per second."""

    kind: Literal["goodput"] = "goodput"
    """The policy."""
    check_every: int = Field(default=5, ge=1)
    """Steps between two looks."""
    efficiency_floor: float = Field(default=0.1, gt=0.0, lt=1.0)
    """The batch stays where a sample brings at least this fraction of what it brings at batch 1.
    0.5 is the critical batch, at which twice the fewest samples are needed."""
    min_gain: float = Field(default=0.05, ge=0.0)
    """Change only for a larger relative gain in goodput."""
    cool_down_steps: int = Field(default=5, ge=0)
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
        self.tried = False
        """Whether there was a trial."""
        self.base: int | None = None
        """The batch before the trial under way."""
        self.guard = Guard()

    def due(self, seen: Seen) -> bool:
        """Whether to look before this step. Local."""
        if seen.resolved and not self.resolved:
            return True
        return seen.step - self.looked >= self._table.check_every

    def decide(self, seen: Seen) -> Decision:
        """What the next step takes. Local."""
        decision = super().decide(seen)
        self.resolved = self.resolved or seen.resolved
        return decision

    def look(self, seen: Seen) -> Decision:
        """The batch for the steps to come, with a reason. Local."""
        noise, times = seen.noise, seen.times
        facts: Facts = {**noise_facts(noise), "action": "keep"}
        if noise is None:
            return self.kept("the gradient noise is not known yet", facts)
        if times is None:
            return self.kept("the times of a step are not known yet", facts)
        base, self.base = self.base or self.batch, None
        low, point, high = self._believed(noise)
        since = seen.step - (self.changed or 0)
        advice = self.guard.advise(self.batch, seen, since, high, in_words(noise), self._rungs)
        if advice is not None:
            facts["action"] = advice.action
            if advice.batch == self.batch:
                return self.kept(advice.why, facts)
            return self.moved(advice.batch, advice.why, facts)
        if self.changed is not None and since < self._goodput.cool_down_steps:
            return self.kept("the last change is too recent", facts)
        rungs = [rung for rung in self._rungs if self.guard.retreat.allows(rung, seen.samples)]
        target, gain, why = weigh(
            base,
            (low, point, high),
            times,
            rungs,
            floor=self._goodput.efficiency_floor,
            least=self._goodput.min_gain,
        )
        trial = target == base and 2 * base in rungs and self._worth_a_trial(base, low, times)
        if trial:
            self.tried, self.base = True, base
            target, why = 2 * base, f"a trial, to learn what a sample costs; {why}"
        facts |= times_facts(point, times)
        facts |= {"cap": self._cap(base, point, times), "gain": gain}
        why = f"{why} ({in_words(noise)}, half of a step is fixed at {times.b_half:.0f})"
        if target == self.batch:
            return self.kept(why, facts)
        facts["action"] = "trial" if trial else "grow" if target > self.batch else "shrink"
        self.guard.retreat.note(self.batch, target, low, seen.samples)
        return self.moved(target, why, facts)

    def state(self) -> State:
        """The batch, when it was looked at, what a trial knows, whether noise was resolved."""
        state = super().state()
        state.counters |= {"resolved": self.resolved, "tried": self.tried, "base": self.base}
        state.counters |= State.nested({"guard": self.guard.state()}).counters
        return state

    def load_state(self, state: State) -> None:
        """Go on from there, at the nearest batch of the present ladder. Local."""
        super().load_state(state)
        self.batch = max((r for r in self._rungs if r <= self.batch), default=self._rungs[0])
        self.resolved = bool(state.counters.get("resolved"))
        self.tried = bool(state.counters.get("tried"))
        self.guard.load_state(state.below("guard"))
        base = int(state.counters.get("base") or 0)
        self.base = base if base in self._rungs else None

    def _believed(self, noise: NoiseEstimate) -> tuple[float, float, float]:
        """Low end, best guess and high end of B_S."""
        point = noise.b_s if noise.resolved else noise.low
        factor = self._goodput.noise_scale_factor
        return scaled(noise.low, factor), scaled(point, factor), scaled(noise.high, factor)

    def _worth_a_trial(self, batch: int, low: float, times: StepTimes) -> bool:
        efficient = 2 * batch <= floor_batch(low, self._goodput.efficiency_floor)
        return times.from_one_size and not self.tried and efficient

    def _cap(self, batch: int, b_s: float, times: StepTimes) -> str | None:
        """Which bound keeps the batch from B*; None: none does."""
        floor = floor_batch(b_s, self._goodput.efficiency_floor)
        above = {"efficiency_floor": floor, "batch_max": self._table.batch_max}
        below = {"batch_min": self._table.smallest, "half": batch / 2}
        return cap_of(best_batch(b_s, times), above | {"4 times": 4 * batch}, below)
