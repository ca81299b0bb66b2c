"""Where a run stands: steps, samples and epochs, and how far it has to go."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpctrain.settings import Train
from hpctrain.state import Counter, Placed, State


@dataclass
class Clock:
    """Counts optimiser steps and samples over all ranks; equal on all ranks.

    Learning-rate schedules and the end of the run live on the sample clock, so that they do not
    move when the batch size changes; `train.steps` alone counts steps.
    """

    samples_per_epoch: int
    total_samples: int
    """What schedules take as the whole run; the run ends there unless `total_steps` is given."""
    total_steps: int | None
    step: int = 0
    samples: int = 0
    own_step: int = 0
    """Steps of this rank; `step` is their mean over ranks, where these go at their own pace."""
    own_samples: int = 0
    """Samples of this rank."""
    seconds: float = 0.0
    """Since the start of this attempt, as last heard from all ranks."""
    own_pace: bool = False
    """Whether ranks make unequal numbers of steps; `step` and `samples` then follow what all ranks
    have said."""

    @classmethod
    def of(cls, train: Train, samples_per_epoch: int, batch_global: int) -> Clock:
        """The clock of a run. `batch_global` turns steps into samples for the schedule. Local."""
        if train.steps is not None:
            return cls(samples_per_epoch, train.steps * batch_global, train.steps)
        if train.samples is not None:
            return cls(samples_per_epoch, train.samples, None)
        assert train.epochs is not None
        return cls(samples_per_epoch, max(1, round(train.epochs * samples_per_epoch)), None)

    @property
    def epoch(self) -> float:
        """Epochs passed, with fraction."""
        return self.samples / self.samples_per_epoch

    @property
    def done(self) -> bool:
        """Whether the run has all its steps or samples."""
        if self.total_steps is not None:
            return self.step >= self.total_steps
        return self.samples >= self.total_samples

    @property
    def progress(self) -> float:
        """Fraction of the run that has passed, 0 to 1."""
        if self.total_steps is not None:
            return min(1.0, self.step / self.total_steps)
        return min(1.0, self.samples / self.total_samples)

    @property
    def samples_left(self) -> int | None:
        """Samples until the end; None when steps decide."""
        if self.total_steps is not None or self.own_pace:
            return None
        return self.total_samples - self.samples

    def advance(self, batch_global: int, batch_local: int) -> None:
        """One step with so many samples is done. Local."""
        self.own_step += 1
        self.own_samples += batch_local
        if not self.own_pace:
            self.step += 1
            self.samples += batch_global

    def follow(self, steps_done: float, samples_done: float, size: int) -> None:
        """Take what all ranks have done, summed, where they go at their own pace. Local."""
        if self.own_pace:
            self.step, self.samples = int(steps_done) // size, int(samples_done)

    def state(self) -> State:
        """Local. At their own pace, ranks in another number go on with the mean of the old ones."""
        counters: dict[str, Counter] = {"step": self.step, "samples": self.samples}
        if not self.own_pace:
            return State(counters=counters)
        own = torch.tensor([self.own_step, self.own_samples], dtype=torch.float64)
        return State({"own": Placed(own, "per_rank", "mean")}, counters)

    def load_state(self, state: State) -> None:
        """Local."""
        self.step = int(state.counters["step"] or 0)
        self.samples = int(state.counters["samples"] or 0)
        self.own_step = self.step
        if "own" in state.tensors:
            own_step, own_samples = state.tensors["own"].tensor.tolist()
            self.own_step, self.own_samples = int(own_step), int(own_samples)


class Every:
    """Fires when a counter has passed another multiple of a period; 0 or None never fires."""

    def __init__(self, period: float | None) -> None:
        self._period = period or 0.0
        self.fired = 0
        """Multiples passed so far; part of the run's state."""

    def due(self, value: float) -> bool:
        """Whether a multiple was passed since the last time this said so. Local."""
        passed = int(value / self._period + 1e-9) if self._period else 0
        fires, self.fired = passed > self.fired, max(passed, self.fired)
        return fires
