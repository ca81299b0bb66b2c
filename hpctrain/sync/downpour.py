"""DOWNPOUR: members push what they have learnt to a centre and go on from the centre.

    every `every` steps of its own a member pushes x_i - base to the centre, c <- c + (x_i - base),
    and asks for it; when it has come, some steps later:
        x_i <- c + (x_i - base);   base <- c            (base: x_i at the push, or c since)

With every = 1 it is asynchronous SGD. The centre lies in pieces on the members, nobody waits, and a
push is as old as the member's last fetch. Members' steps add up, so the step size must be small or
divided by their number. Per exchange a member sends and receives the vector once each.

Source: Dean et al. 2012, "Large Scale Distributed Deep Networks", NeurIPS 25, algorithm 1.
Differences: updates are pushed, not gradients for a server's optimiser; the member trains on while
its question is answered and keeps what it learns meanwhile for the next push; no server.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from hpctrain.state import State
from hpctrain.sync.centre import CentredRule
from hpctrain.sync.rule import Ground
from hpctrain.sync.table import RuleTable


class Downpour(RuleTable):
    """[[sync]] kind = "downpour"."""

    kind: Literal["downpour"] = "downpour"
    """A centre that everybody adds to, without waiting."""
    every: int = Field(default=1, ge=1)
    """This member's steps between two pushes."""
    asynchronous: Literal[True] = True
    """It has no other form."""

    def build(self, ground: Ground) -> DownpourRule:
        """Collective. The running rule."""
        return DownpourRule(self, ground)


class DownpourRule(CentredRule):
    """Runs `Downpour`."""

    def __init__(self, config: Downpour, ground: Ground) -> None:
        super().__init__(config.period, ground)
        self._base_N = ground.payload.pack().clone()

    def follow(self, vector_N: Tensor) -> None:
        """As `CentredRule.follow`: the centre, and what was learnt since the last push."""
        vector_N.sub_(self._base_N).add_(self.centre.arrived_N)
        self._base_N.copy_(self.centre.arrived_N)

    def push(self) -> None:
        """Collective over the replica. Add what has been learnt to the centre."""
        vector_N = self._payload.pack()
        self.centre.add(vector_N - self._base_N)
        self._base_N.copy_(vector_N)

    def settle(self) -> None:
        """As `Rule.settle`. All last steps are pushed; all go on from one centre."""
        if self._members.size == 1:
            return
        self.centre.settle()
        self.push()
        self.centre.settle()
        self._base_N.copy_(self.centre.gather())
        self._payload.pack().copy_(self._base_N)
        self._payload.unpack()

    def load_state(self, state: State) -> None:
        """As `CentredRule.load_state`."""
        super().load_state(state)
        self._base_N.copy_(self._payload.pack())
