"""A policy that looks at the measurements now and then, and holds its batch between two looks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from hpctrain.batch.policy import Decision, Facts, Seen
from hpctrain.batch.table import AdaptiveTable
from hpctrain.state import State


class LookingPolicy(ABC):
    """Asks `look` every `check_every` steps, and remembers the answer.

    Args:
        table: Its configuration.
    """

    def __init__(self, table: AdaptiveTable) -> None:
        self._table = table
        self.batch = table.batch_global
        """What the steps take at present."""
        self.looked = 0
        """Step of the last look."""
        self.changed: int | None = None
        """Step of the last change."""

    @abstractmethod
    def look(self, seen: Seen) -> Decision:
        """The batch for the steps to come, with a reason. Local."""

    def due(self, seen: Seen) -> bool:
        """Whether to look before this step. Local."""
        return seen.step - self.looked >= self._table.check_every

    def decide(self, seen: Seen) -> Decision:
        """What the next step takes. Local."""
        if not self.due(seen):
            return Decision(self.batch)
        decision = self.look(seen)
        self.looked = seen.step
        if decision.batch_global != self.batch:
            self.changed = seen.step
        self.batch = decision.batch_global
        return decision

    def kept(self, why: str, facts: Facts) -> Decision:
        """The present batch, and why it stays. Local."""
        return Decision(self.batch, reason=f"kept {self.batch}: {why}", facts=facts)

    def moved(self, batch: int, why: str, facts: Facts) -> Decision:
        """Another batch, and why. Local."""
        return Decision(batch, reason=f"{self.batch} -> {batch}: {why}", facts=facts)

    def state(self) -> State:
        """The batch and when it was last looked at and changed. Local."""
        counters = {"batch": self.batch, "looked": self.looked, "changed": self.changed}
        return State(counters=dict(counters))

    def load_state(self, state: State) -> None:
        """Go on from there, within the present bounds. Local."""
        counters = state.counters
        self.batch = self._table.within(int(counters.get("batch") or self._table.batch_global))
        self.looked = int(counters.get("looked") or 0)
        changed = counters.get("changed")
        self.changed = None if changed is None else int(changed)
