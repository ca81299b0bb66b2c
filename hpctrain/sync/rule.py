"""What all rules share: when they act, over whom, and what a running one offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from hpctrain.state import State
from hpctrain.sync.members import Members
from hpctrain.sync.payload import Payload
from hpctrain.sync.table import RuleTable
from hpctrain.sync.trigger import Elapsed, Trigger

Phase = Literal["before_update", "after_update"]
"""before_update: after backward, on the parameters at which the gradient was taken."""


@dataclass(frozen=True)
class Moment:
    """A step on this rank, as rules see it."""

    elapsed: Elapsed
    lr: float
    """Of this step."""
    loss_sum: float
    """Over this rank's samples of this step."""
    samples: int
    """This rank's samples of this step."""

    @property
    def step(self) -> int:
        """Steps of this rank, with the one under way."""
        return self.elapsed.step

    @property
    def epoch(self) -> float:
        """Passes over the training set before this step."""
        return self.elapsed.epoch


@dataclass(frozen=True)
class Ground:
    """What a running rule works with."""

    members: Members
    payload: Payload
    gradient_norm: Callable[[], float]
    """Euclidean norm of the gradient of the step under way; local."""
    probe: Callable[[], tuple[float, int]] | None = None
    """This rank's share of a forward pass over the probe batch: (sum of losses, samples)."""
    lr_base: float = 1.0
    """The largest step size of the run."""
    seed: int = 0


class Rule(Protocol):
    """A running rule; a config's `build` makes it.

    At a step the loop calls `observe` and then, where `due`, `meet`, in the phase that `phase`
    says. All members agree on the steps at which they meet.
    """

    phase: Phase
    own_pace: bool
    """Whether members make unequal numbers of steps."""

    def observe(self, at: Moment) -> None:
        """See a step of this rank. Collective over the replica; may pull the parameters."""
        ...

    def due(self, at: Moment) -> bool:
        """Whether the members meet at this step. Local."""
        ...

    def meet(self, at: Moment, vector_N: Tensor) -> None:
        """Collective over the members. Reconcile in place.

        Args:
            at: The step.
            vector_N: (N,) what `Payload.pack` gave: parameters first.

        Raises:
            NonFinite: no member has finite parameters.
        """
        ...

    def settle(self) -> None:
        """Collective over the members. End what is under way, before parameters are looked at."""
        ...

    def tally(self) -> dict[str, float]:
        """Local. Numbers for metrics.jsonl; of a meeting, equal on all members."""
        ...

    def remark(self) -> str:
        """A warning for people, "" where there is none. Local."""
        ...

    def state(self) -> State: ...

    def load_state(self, state: State) -> None: ...


class PeriodicRule:
    """A rule whose members meet; what most rules have in common.

    Args:
        config: When they meet.
        period: Epoch -> `every`, where the rule does not take its config's.
    """

    phase: Phase = "after_update"

    def __init__(self, config: RuleTable, period: Callable[[float], int] | None = None) -> None:
        self._trigger = Trigger(config.unit, period or config.period)
        self.own_pace = config.own_pace
        self._tally: dict[str, float] = {}

    def observe(self, at: Moment) -> None:
        """Nothing happens between meetings. Local."""

    def due(self, at: Moment) -> bool:
        """As `Rule.due`."""
        return self._trigger.due(at.elapsed)

    def held(self, at: Moment, tally: dict[str, float]) -> None:
        """The members have met. Local."""
        self._trigger.held(at.elapsed)
        self._tally = tally

    def tally(self) -> dict[str, float]:
        """As `Rule.tally`."""
        return self._tally

    def remark(self) -> str:
        """As `Rule.remark`: nothing."""
        return ""

    def settle(self) -> None:
        """As `Rule.settle`: nothing is under way."""


class PolledRule:
    """A rule whose members never meet: messages are posted, and polled at every step."""

    phase: Phase = "after_update"
    own_pace = True

    def due(self, at: Moment) -> bool:
        """Never. Local."""
        return False

    def meet(self, at: Moment, vector_N: Tensor) -> None:
        """Not called: nobody waits."""
        raise AssertionError("a polled rule holds no meetings")

    def remark(self) -> str:
        """As `Rule.remark`: nothing."""
        return ""
