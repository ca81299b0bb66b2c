"""Elastic averaging in which nobody waits: the centre lies in pieces on the members.

    every `every` steps of its own a member asks for the centre; when it has come, some steps later:
        e = alpha * (x_i - c);   x_i <- x_i - e;   c <- c + e        (alpha = beta / M)

Each member goes at its own pace. c is put together of pieces that their owners may have changed
meanwhile; what one member takes the centre gains, so the sum of all x_i and c is conserved. Per
exchange a member sends and receives the vector once each.

Source: Zhang, Choromanska, LeCun 2015, arXiv 1412.6651, algorithm 1. Differences: the member trains
on while its question is answered; the centre has no server.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpctrain.state import Placed, State
from hpctrain.sync.centre import Centre
from hpctrain.sync.rule import Ground, Moment, PolledRule


class PolledElasticRule(PolledRule):
    """Runs `Elastic` with `asynchronous = true`.

    Args:
        period: Epoch -> this member's steps between two questions.
        alpha: Stiffness of the spring.
        ground: What to work with.
    """

    def __init__(self, period: Callable[[float], int], alpha: float, ground: Ground) -> None:
        self._period, self._alpha = period, alpha
        self._payload = ground.payload
        self._members = ground.members
        self.centre = Centre(ground.members, ground.payload.pack())
        self._asked = 0
        self._exchanges = 0

    def observe(self, at: Moment) -> None:
        """Answer others; be pulled when the centre has come; ask when it is time. Local."""
        if self._members.size == 1:
            return
        if self.centre.poll():
            vector_N = self._payload.pack()
            pull_N = torch.sub(vector_N, self.centre.arrived_N).mul_(self._alpha)
            vector_N.sub_(pull_N)
            self._payload.unpack()
            self.centre.add(pull_N)
            self._exchanges += 1
        if at.step - self._asked >= self._period(at.epoch) and not self.centre.asking:
            self._asked = at.step
            self.centre.ask()

    def settle(self) -> None:
        """As `Rule.settle`. A question under way is given up and asked again later."""
        if self._members.size > 1:
            self.centre.settle()

    def tally(self) -> dict[str, float]:
        """As `Rule.tally`: this member's exchanges and what its piece of the centre was added."""
        return {"exchanges": self._exchanges, "centre_version": self.centre.version}

    def whole(self) -> Tensor:
        """Collective, after `settle`. (N,) the centre."""
        return self.centre.gather()

    def state(self) -> State:
        """This member's piece of the centre. Local, after `settle`."""
        return State({"centre": Placed(self.centre.piece_K, "per_rank", "reset")})

    def load_state(self, state: State) -> None:
        """Local. At another number of ranks the centre starts afresh, at the parameters."""
        self.centre.load(self._payload.pack())
        if "centre" in state.tensors:
            self.centre.piece_K.copy_(state.tensors["centre"].tensor)
