"""What one step took and said, on one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpctrain.agreement import Heard
from hpctrain.control import Maxima, Sums


@dataclass(frozen=True)
class Timing:
    """Seconds of one step on this rank."""

    step_s: float
    compute_s: float
    exchange_s: float
    sync_s: float
    input_s: float

    def added_to(self, totals: Sums, samples: int) -> Sums:
        """The totals with one more step of so many samples. Local."""
        return replace(
            totals,
            step_s=totals.step_s + self.step_s,
            compute_s=totals.compute_s + self.compute_s,
            exchange_s=totals.exchange_s + self.exchange_s,
            sync_s=totals.sync_s + self.sync_s,
            input_s=totals.input_s + self.input_s,
            steps_timed=totals.steps_timed + 1,
            samples_timed=totals.samples_timed + samples,
        )


@dataclass(frozen=True)
class Stepped:
    """A step that is done: what this rank said of it, what its replica said, and its seconds."""

    own: Sums
    maxima: Maxima
    replica: Heard
    timing: Timing
