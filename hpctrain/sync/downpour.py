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

from hpctrain.state import Placed, State
from hpctrain.sync.centre import Centre
from hpctrain.sync.rule import Ground, Moment, PolledRule
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


class DownpourRule(PolledRule):
    """Runs `Downpour`."""

    def __init__(self, config: Downpour, ground: Ground) -> None:
        self._period = config.period
        self._payload = ground.payload
        self._members = ground.members
        self._base_N = ground.payload.pack().clone()
        self.centre = Centre(ground.members, self._base_N)
        self._asked = 0
        self._exchanges = 0

    def observe(self, at: Moment) -> None:
        """Answer others; go on from the centre when it has come; push when it is time. Local."""
        if self._members.size == 1:
            return
        if self.centre.poll():
            vector_N = self._payload.pack()
            vector_N.sub_(self._base_N).add_(self.centre.arrived_N)
            self._base_N.copy_(self.centre.arrived_N)
            self._payload.unpack()
            self._exchanges += 1
        if at.step - self._asked >= self._period(at.epoch) and not self.centre.asking:
            self._asked = at.step
            self._push()
            self.centre.ask()

    def settle(self) -> None:
        """As `Rule.settle`. All last steps are pushed; all go on from one centre."""
        if self._members.size == 1:
            return
        self.centre.settle()
        self._push()
        self.centre.settle()
        self._base_N.copy_(self.centre.gather())
        self._payload.pack().copy_(self._base_N)
        self._payload.unpack()

    def tally(self) -> dict[str, float]:
        """As `Rule.tally`: this member's exchanges and what its piece of the centre was added."""
        return {"exchanges": self._exchanges, "centre_version": self.centre.version}

    def state(self) -> State:
        """This member's piece of the centre. Local, after `settle`."""
        return State({"centre": Placed(self.centre.piece_K, "per_rank", "reset")})

    def load_state(self, state: State) -> None:
        """Local. At another number of ranks the centre starts afresh, at the parameters."""
        self.centre.load(self._payload.pack())
        if "centre" in state.tensors:
            self.centre.piece_K.copy_(state.tensors["centre"].tensor)
        self._base_N.copy_(self._payload.pack())

    def _push(self) -> None:
        vector_N = self._payload.pack()
        self.centre.add(vector_N - self._base_N)
        self._base_N.copy_(vector_N)
