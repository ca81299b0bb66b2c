"""Asks the batch policy what the next step takes.

A policy that needs nothing measured is asked before every step; others every `batch.check_every`
steps and at the end of an epoch. All numbers it sees are reduced, so all ranks decide alike. What
it decided holds until it is asked again, the step size's factor too: both stand in batch_plan.jsonl
and can be replayed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hpctrain.batch import BatchConfig, Decision, Seen, StepTimes
from hpctrain.batch.lr import LrConfig, adascale_gain
from hpctrain.batch.policy import LOSSES
from hpctrain.batch.times import TimesFit
from hpctrain.clock import Clock
from hpctrain.control import Sums
from hpctrain.measurement import Measurement
from hpctrain.models.flat import FlatModel
from hpctrain.state import Placed, State
from hpctrain.stats.epoch import EpochDiversity
from hpctrain.stats.noise import GroupSums, NoiseEstimate

_ALIKE = 0.1
"""Where ranks hear of several steps at once, a short last batch of an epoch lowers their mean: up
to such a share it counts as the batch that was decided."""


@dataclass(frozen=True)
class Next:
    """What the next step takes."""

    decision: Decision
    considered: bool = False
    """Whether the policy weighed something, or changed something: it is written down."""
    changes_batch: bool = False
    """Whether it differs from the batch before; people are told."""


class BatchControl:
    """The batch policy of one run at work.

    Args:
        config: The table [batch].
        lr: The table [lr].
        ranks: How many.
        replicas: How many.
        flat: The model.
        measurement: What the policy sees comes from it.
        census: B_S over the whole training set at the present parameters, for a policy that asks
            for it at the end of epochs; collective.

    Raises:
        ConfigError: so many ranks cannot share such batches.
    """

    def __init__(
        self,
        config: BatchConfig,
        lr: LrConfig,
        *,
        ranks: int,
        replicas: int,
        flat: FlatModel,
        measurement: Measurement,
        census: Callable[[], float],
    ) -> None:
        config.require_ranks(ranks)
        self._config, self._lr = config, lr
        self._ranks, self._replicas = ranks, replicas
        self._flat, self._measurement, self._census = flat, measurement, census
        self._policy = config.build()
        self._held: Decision | None = None
        self._times = TimesFit()
        self._told = Sums()
        self._losses: deque[tuple[int, float]] = deque(maxlen=LOSSES)
        self._fixed_times: StepTimes | None = None
        self._epoch = None
        if "epoch" in config.needs:
            self._epoch = EpochDiversity(flat.n_params, flat.grads_P.device)
        self._epochs = 0
        """Whole ones that have passed."""
        self._epoch_b_s: float | None = None

    def next(self, clock: Clock) -> Next:
        """Collective where the policy asks for the whole data set, else local."""
        epochs = clock.samples // clock.samples_per_epoch
        ended, self._epochs = epochs > self._epochs, epochs
        if ended:
            self._close_epoch()
        looks = bool(self._config.needs) or self._goes_by_noise
        if self._held and looks and not ended and clock.step % self._config.check_every:
            return Next(self._held)
        seen = self._seen(clock)
        found = self._policy.decide(seen)
        found = replace(found, gain=found.gain * self._rule_gain(found.batch_global, seen.noise))
        before, self._held = self._held, found
        resized = before is not None and before.batch_global != found.batch_global
        if not found.reason and before is None:
            start = f"{found.batch_global} to start with"
            found = replace(found, reason=start, facts={"splits": seen.splits})
        elif before is not None and not found.reason and before.gain != found.gain:
            found = replace(found, reason=f"step size x {found.gain:.3g}")
        return Next(found, considered=bool(found.reason), changes_batch=resized)

    def take(self, sums: GroupSums | None) -> None:
        """Local. A step's groups, with the step's mean gradient in the flat gradient."""
        if self._epoch is not None and sums is not None:
            s2, _ = sums.moments()
            sum_sq = sums.samples * sums.mean_sq + (sums.samples - 1.0) * s2
            self._epoch.add(sum_sq, round(sums.samples), self._flat.grads_P)

    def hear(self, step: int, sums: Sums) -> None:
        """Local. Take in what all ranks said after `step` steps: losses, and the times of steps."""
        told, self._told = self._told, sums
        timed = sums.steps_timed - told.steps_timed
        if "times" not in self._config.needs:
            return
        if sums.samples:
            self._losses.append((step, sums.loss / sums.samples))
        if timed <= 0:
            return
        samples = (sums.samples_timed - told.samples_timed) * self._ranks / timed
        if self._held and abs(samples / self._held.batch_global - 1.0) < _ALIKE:
            samples = self._held.batch_global
        step_s = (sums.step_s - told.step_s - (sums.sync_s - told.sync_s)) / timed
        # Meetings are rare and dear: a median of some steps would leave them out.
        step_s += sums.sync_s / sums.steps_timed
        self._times.add(round(samples), step_s, (sums.compute_s - told.compute_s) / timed)

    def fix_times(self, times: StepTimes) -> None:
        """Local. From now on the policy sees these times, whatever steps take.

        For studies on ranks whose own times tell nothing.
        """
        self._fixed_times = times

    def state(self) -> State:
        """Local, after `Measurement.settle`."""
        parts = {"policy": self._policy.state(), "times": self._times.state()}
        if self._epoch is not None:
            parts["epoch"] = self._epoch.state()
        whole = State.nested(parts)
        whole.tensors["losses"] = Placed(torch.tensor(list(self._losses), dtype=torch.float64))
        whole.counters |= {"ranks": self._ranks, "epochs": self._epochs}
        if self._held is not None:
            whole.counters |= {"batch_global": self._held.batch_global, "gain": self._held.gain}
        return whole

    def load_state(self, state: State) -> None:
        """Local. Times of another number of ranks are forgotten.

        Raises:
            ConfigError: the state is of another policy.
        """
        counters = state.counters
        self._policy.load_state(state.below("policy"))
        if counters["ranks"] == self._ranks:
            self._times.load_state(state.below("times"))
        if self._epoch is not None:
            self._epoch.load_state(state.below("epoch"))
        self._epochs = int(counters["epochs"] or 0)
        self._losses.clear()
        self._losses.extend((int(s), loss) for s, loss in state.tensors["losses"].tensor.tolist())
        if "batch_global" in counters:
            batch, gain = counters["batch_global"], counters["gain"]
            self._held = Decision(int(batch or 0), float(gain or 0.0))

    @property
    def _goes_by_noise(self) -> bool:
        by_rule = self._lr.kind == "adascale" and not self._config.replays
        return "noise" in self._config.needs or by_rule

    def _seen(self, clock: Clock) -> Seen:
        return Seen(
            step=clock.step,
            samples=clock.samples,
            epoch=clock.epoch,
            samples_per_epoch=clock.samples_per_epoch,
            ranks=self._ranks,
            noise=self._measurement.estimate() if self._goes_by_noise else None,
            latest=self._measurement.latest,
            times=self._fixed_times or self._times.times,
            epoch_diversity=self._epoch_b_s,
            losses=tuple(self._losses),
            splits=self._measurement.form == "pieces",
        )

    def _rule_gain(self, batch_global: int, noise: NoiseEstimate | None) -> float:
        """What [lr] kind = "adascale" makes of this batch; 1 for other kinds and in a replay."""
        if self._lr.kind != "adascale" or self._config.replays:
            return 1.0
        assert self._lr.reference_batch is not None
        b_s = 1.0 if noise is None else noise.b_s if noise.resolved else noise.low
        batch = batch_global / self._replicas
        return adascale_gain(batch, self._lr.reference_batch, max(b_s - 1.0, 0.0))

    def _close_epoch(self) -> None:
        """What the epoch that has just ended says of its diversity."""
        if self._epoch is not None:
            self._epoch_b_s = self._epoch.b_s()
            self._epoch.reset()
        elif "oracle" in self._config.needs:
            self._epoch_b_s = self._census()
