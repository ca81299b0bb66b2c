"""What a batch policy sees and says. Everything it sees is equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hpctrain.state import Stateful
from hpctrain.stats.noise import GroupSums, NoiseEstimate

Facts = dict[str, float | bool | str | None]
"""Numbers behind a decision, by name; null where one is not known."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step as a straight line: t(B) = fixed_s + per_sample_s * B."""

    fixed_s: float
    """What a step costs whatever it takes: waiting for the exchange, the update."""
    per_sample_s: float
    """What one more sample of the global batch costs."""
    from_one_size: bool = False
    """Whether all steps had the same batch: what a pass costs whatever its size is then counted per
    sample."""

    @property
    def b_half(self) -> float:
        """The batch at which half of a step is fixed cost."""
        return self.fixed_s / self.per_sample_s


LOSSES = 64
"""Training losses that a policy sees."""


@dataclass(frozen=True)
class Seen:
    """What is known before a step."""

    step: int
    samples: int
    epoch: float
    """Passes over the training set, with fraction."""
    samples_per_epoch: int
    ranks: int
    noise: NoiseEstimate | None = None
    """None before the first measured step, or where nothing is measured."""
    latest: GroupSums | None = None
    """The last measured step's own sums, not averaged."""
    times: StepTimes | None = None
    """None before they are known."""
    epoch_diversity: float | None = None
    """n * Delta of the last whole epoch by DiveBatch's estimator, or its exact value at the end of
    that epoch, for the policy that asks for it."""
    losses: Sequence[tuple[int, float]] = ()
    """(step, mean training loss) of the last `LOSSES` times that ranks told it, oldest first."""
    splits: bool = False
    """Whether a single rank takes some shares in two passes to measure its noise."""

    @property
    def resolved(self) -> bool:
        """Whether times are known, and noise so well that the mean gradient stands out of it."""
        return self.times is not None and self.noise is not None and self.noise.resolved


@dataclass(frozen=True)
class Decision:
    """What the next step takes."""

    batch_global: int
    gain: float = 1.0
    """The step size is multiplied by it, beside the rule of [lr]."""
    reason: str = ""
    """Why, in plain words; "" where nothing was considered."""
    facts: Facts = field(default_factory=dict)
    """The numbers behind it, for batch_plan.jsonl."""


class BatchPolicy(Stateful, Protocol):
    """Decides the size of each step's batch from numbers that are equal on all ranks."""

    def decide(self, seen: Seen) -> Decision:
        """What the next step takes; asked before every step. Local.

        A `reason` is given whenever the policy weighed a change, also where it kept the batch.
        """
        ...
