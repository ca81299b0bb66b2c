"""A batch that grows by a constant factor every so many epochs, while the step size falls less.

    k     = growths so far = floor(epoch / every_epochs), at most as many as it takes to batch_max
    batch = min(batch_global * factor^k, batch_max)
    lr    = (what [lr] says) * lr_factor^k

A fixed batch whose step size falls by lr_factor / factor at the same epochs has the same ratio of
step size to batch. That holds with [lr] kind = "none"; a rule that scales the step size with the
batch multiplies it by its own factor besides, and goes with lr_factor = 1.

Source: Devarakonda, Naumov, Garland 2017, "AdaBatch", arXiv 1712.02029, section 3: doubling every
20 epochs with a decay of 0.75 in place of 0.375. Difference: growth stops at `batch_max`, and then
so does this decay; the schedule of [lr] goes on.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from hpctrain.batch.policy import Decision, Seen
from hpctrain.batch.table import AdaptiveTable
from hpctrain.state import State


class AdaBatch(AdaptiveTable):
    """[batch] kind = "adabatch": a growing batch, by the epoch."""

    kind: Literal["adabatch"] = "adabatch"
    """The policy."""
    factor: float = Field(default=2.0, gt=1.0)
    """The batch grows by it."""
    every_epochs: float = Field(default=20.0, gt=0.0)
    """Epochs from one growth to the next."""
    lr_factor: float = Field(default=0.75, gt=0.0, le=1.0)
    """The step size is multiplied by it at every growth, beside the rule of [lr]."""

    def build(self) -> AdaBatchPolicy:
        """The running policy. Local."""
        return AdaBatchPolicy(self)


class AdaBatchPolicy:
    """Runs the schedule; remembers which growth it has told.

    Args:
        table: Its configuration.
    """

    def __init__(self, table: AdaBatch) -> None:
        self._table = table
        room = math.log(table.batch_max / table.batch_global) / math.log(table.factor)
        self._most = max(0, math.ceil(room - 1e-9))
        self.growths = 0
        """So far."""

    def decide(self, seen: Seen) -> Decision:
        """What the next step takes. Local."""
        table = self._table
        period = table.every_epochs * seen.samples_per_epoch
        growths = min(int(seen.samples / period + 1e-9), self._most)
        batch, gain = self._batch(growths), table.lr_factor**growths
        if growths == self.growths:
            return Decision(batch, gain)
        before, self.growths = self._batch(self.growths), growths
        why = f"{before} -> {batch}: growth {growths}, every {table.every_epochs:g} epochs"
        return Decision(batch, gain, why, {"action": "grow", "growths": growths})

    def state(self) -> State:
        """The growths so far. Local."""
        return State(counters={"growths": self.growths})

    def load_state(self, state: State) -> None:
        """Go on from there. Local."""
        self.growths = int(state.counters.get("growths") or 0)

    def _batch(self, growths: int) -> int:
        return self._table.within(self._table.batch_global * self._table.factor**growths)
