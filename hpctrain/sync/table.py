"""What the tables of all rules have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpctrain.sync.payload import BufferPolicy, MomentumPolicy
from hpctrain.sync.trigger import Unit
from hpctrain.table import Table

Scope = Literal["world", "cross", "switch", "group", "node", "numa"]
"""world: all replicas; switch: those of the nodes at this rank's switch; group: those of its group
of the table [topology]; node: those of its node; numa: those of its NUMA domain; cross: those at
its place in the other nodes."""


class RuleTable(Table):
    """Keys of every table [[sync]]."""

    scope: Scope = "world"
    """Which replicas are reconciled."""
    every: int = Field(default=16, ge=1)
    """How long from one meeting to the next."""
    schedule: list[Annotated[list[float], Field(min_length=2, max_length=2)]] = []
    """Instead of `every`: pairs [epoch, every], such as [[0, 1], [150, 16]] for replicas that may
    drift from epoch 150 on."""
    unit: Unit = "steps"
    """Of `every`: steps of every rank; steps of all together, on average; or seconds. With the
    last two ranks make unequal numbers of steps between meetings."""
    buffers: BufferPolicy = "mix"
    """Floating buffers (statistics of batch normalisation): reconciled as parameters are, or each
    replica's own."""
    momentum: MomentumPolicy = "keep"
    """The optimiser's memory: kept, reconciled as parameters are, or set to zero at a meeting."""

    @model_validator(mode="after")
    def _schedule_rises(self) -> RuleTable:
        if self.schedule:
            epochs = [epoch for epoch, _ in self.schedule]
            if epochs[0] != 0 or sorted(set(epochs)) != epochs:
                raise ValueError(
                    f"schedule starts at epoch 0 and its epochs increase; got epochs {epochs}"
                )
            if any(every < 1 or every != int(every) for _, every in self.schedule):
                raise ValueError(f"every is a whole number from 1 on; got schedule {self.schedule}")
            if self._changed("every"):
                raise ValueError("give every or schedule, not both")
        return self

    @model_validator(mode="after")
    def _counts_own_steps(self) -> RuleTable:
        if getattr(self, "asynchronous", False) and self.unit != "steps":
            raise ValueError(
                f'asynchronous = true counts every replica\'s own steps; drop unit = "{self.unit}"'
            )
        return self

    def _changed(self, key: str) -> bool:
        """Whether a key has another value than its default: a dumped table names all keys."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def own_pace(self) -> bool:
        """Whether ranks make unequal numbers of steps. Local."""
        return self.unit != "steps" or bool(getattr(self, "asynchronous", False))

    def period(self, epoch: float) -> int:
        """How long from one meeting to the next at that epoch. Local."""
        passed = [int(every) for start, every in self.schedule if start <= epoch]
        return passed[-1] if passed else self.every
