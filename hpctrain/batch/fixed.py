"""The same number of samples at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpctrain.batch.policy import Decision, Seen
from hpctrain.batch.table import BatchTable
from hpctrain.state import State


class Fixed(BatchTable):
    """[batch] kind = "fixed": every step takes `batch_global` samples over all ranks."""

    kind: Literal["fixed"] = "fixed"
    """The policy."""

    def build(self) -> FixedPolicy:
        """The running policy. Local."""
        return FixedPolicy(self.batch_global)


@dataclass(frozen=True)
class FixedPolicy:
    """Always the same decision; remembers nothing."""

    batch_global: int

    def decide(self, seen: Seen) -> Decision:
        """`batch_global`, whenever asked. Local."""
        return Decision(self.batch_global)

    def state(self) -> State:
        """Empty. Local."""
        return State()

    def load_state(self, state: State) -> None:
        """Nothing to take back. Local."""
