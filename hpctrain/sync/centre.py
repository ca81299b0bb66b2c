"""A centre without a server: every member owns a piece of it and answers for that piece.

Messages are one piece each: a request (empty), the piece as it is now, or what to add to it. A
member asks all owners at once, and goes on training; when all pieces are there it has a centre each
piece of which is some versions old at most. Nobody waits for anybody.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hpctrain.state import Placed, State, shard_bounds
from hpctrain.sync.members import Members
from hpctrain.sync.rule import Ground, Moment, PolledRule

_ASK, _PIECE, _ADD = 0, 1, 2


class Centre:
    """One member's piece of the centre, and its view of the whole. Collective to make.

    Args:
        members: The replicas.
        start_N: (N,) where the centre starts, equal on all members.

    Attributes:
        piece_K: The piece this member owns; live.
        arrived_N: (N,) the last centre that came whole.
        version: Additions that this member's piece has had.
    """

    def __init__(self, members: Members, start_N: Tensor) -> None:
        self._members = members
        self._box = members.mailbox()
        n = start_N.numel()
        self._where = [slice(*shard_bounds(n, k, members.size)) for k in range(members.size)]
        self._mine = self._where[members.rank]
        self.piece_K = start_N[self._mine].clone()
        self.arrived_N = start_N.clone()
        self.version = 0
        self._missing: set[int] = set()

    @property
    def asking(self) -> bool:
        """Whether an answer is outstanding."""
        return bool(self._missing)

    def ask(self) -> None:
        """Ask every owner for its piece. Local, at most one question at a time."""
        assert not self._missing
        self._missing = set(range(self._members.size)) - {self._members.rank}
        for owner in self._missing:
            self._post(owner, _ASK, None)

    def add(self, change_N: Tensor) -> None:
        """Add to the centre. Local; takes effect when the owners poll."""
        for owner, where in enumerate(self._where):
            if owner == self._members.rank:
                self._apply(change_N[where])
            else:
                self._post(owner, _ADD, change_N[where])

    def poll(self) -> bool:
        """Collective over the replica. Answer and take what has arrived; waits for no other one.

        Returns:
            Whether an asked-for centre is now whole, in `arrived_N`.
        """
        return self._take(self._box.poll())

    def settle(self) -> None:
        """Collective. Every message that was posted is done with; a question is given up."""
        self._take(self._box.drain())
        self._take(self._box.drain())
        self._missing = set()

    def gather(self) -> Tensor:
        """Collective, after `settle`. (N,) the centre, equal on all members."""
        whole_N = torch.zeros_like(self.arrived_N)
        whole_N[self._mine] = self.piece_K
        self._members.sum(whole_N.numpy())
        return whole_N

    def load(self, whole_N: Tensor) -> None:
        """Take a stored centre. Local."""
        self.piece_K.copy_(whole_N[self._mine])
        self.arrived_N.copy_(whole_N)

    def _take(self, messages: list[tuple[int, np.ndarray]]) -> bool:
        whole = False
        for source, payload in messages:
            what, content = int(payload[0]), payload[8:].view(self._dtype())
            if what == _ASK:
                self._post(source, _PIECE, self.piece_K)
            elif what == _ADD:
                self._apply(torch.from_numpy(content))
            elif source in self._missing:
                self.arrived_N[self._where[source]] = torch.from_numpy(content)
                self._missing.remove(source)
                if not self._missing:
                    self.arrived_N[self._mine] = self.piece_K
                    whole = True
        return whole

    def _apply(self, change_K: Tensor) -> None:
        self.piece_K += change_K
        self.version += 1

    def _post(self, dest: int, what: int, content: Tensor | None) -> None:
        body = b"" if content is None else content.contiguous().numpy().tobytes()
        message = np.empty(8 + len(body), np.uint8)
        message[:8] = what
        message[8:] = np.frombuffer(body, np.uint8)
        self._box.post(dest, message)

    def _dtype(self) -> np.dtype:
        return self.piece_K.numpy().dtype


class CentredRule(PolledRule, ABC):
    """What the rules around a centre share: ask for it, go on training, go by it when it has come.

    Args:
        period: Epoch -> this member's steps between two questions.
        ground: What to work with.
    """

    def __init__(self, period: Callable[[float], int], ground: Ground) -> None:
        self._period = period
        self._payload = ground.payload
        self._members = ground.members
        self.centre = Centre(ground.members, ground.payload.pack())
        self._asked = 0
        self._exchanges = 0

    @abstractmethod
    def follow(self, vector_N: Tensor) -> None:
        """The centre has come, in `centre.arrived_N`: change (N,) parameters in place. Local."""

    def push(self) -> None:
        """Collective over the replica. What is to reach the centre before it is asked for."""

    def observe(self, at: Moment) -> None:
        """As `Rule.observe`. Answer others; follow when the centre has come; ask in time."""
        if self._members.size == 1:
            return
        if self.centre.poll():
            self.follow(self._payload.pack())
            self._payload.unpack()
            self._exchanges += 1
        if at.step - self._asked >= self._period(at.epoch) and not self.centre.asking:
            self._asked = at.step
            self.push()
            self.centre.ask()

    def settle(self) -> None:
        """As `Rule.settle`. A question under way is given up and asked again later."""
        if self._members.size > 1:
            self.centre.settle()

    def tally(self) -> dict[str, float]:
        """As `Rule.tally`: this member's exchanges and what its piece of the centre was added."""
        return {"exchanges": self._exchanges, "centre_version": self.centre.version}

    def state(self) -> State:
        """This member's piece of the centre. Local, after `settle`."""
        return State({"centre": Placed(self.centre.piece_K, "per_rank", "reset")})

    def load_state(self, state: State) -> None:
        """Collective over the replica. With other ranks the centre starts at the parameters."""
        self.centre.load(self._payload.pack())
        if "centre" in state.tensors:
            self.centre.piece_K.copy_(state.tensors["centre"].tensor)
