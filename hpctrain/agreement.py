"""When what one rank says reaches the others: inside its replica at once, beyond it later.

With one replica all ranks step together, and what they say is reduced at every step. With several,
the ranks of a replica agree at every step; all ranks begin a reduction every `EVERY` steps and look
at it `EVERY` steps later, so that nobody waits for a rank that is less than so many steps behind.
With rules that are asynchronous replicas go at their own pace: a reduction begins when the one
before has been seen, and is seen when it is complete on all ranks of a replica, by each replica at
another step of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from hpctrain.control import Control, Maxima, Sums
from hpctrain.replicas import Replicas
from hpctrain.transport.communicator import Communicator

EVERY = 16
"""Steps from one reduction over several replicas to the next."""

_OF_STEPS = ("loss", "correct", "samples", "non_finite")
"""The sums that count from one reduction to the next; the others are cumulative."""


@dataclass(frozen=True)
class Heard:
    """What all ranks said, equal on all of them."""

    sums: Sums
    maxima: Maxima


class Agreement:
    """Reduces what ranks say. Collective to make.

    Args:
        comm: All ranks.
        replicas: Which of them hold equal parameters.
        own_pace: Whether replicas make unequal numbers of steps.
    """

    def __init__(self, comm: Communicator, replicas: Replicas, *, own_pace: bool = False) -> None:
        self.own_pace = own_pace
        self._inside = Control(_duplicate(replicas.inside))
        self._world = self._inside if replicas.count == 1 else Control(_duplicate(comm))
        self._said = Sums()
        self._under_way = False

    @property
    def in_step(self) -> bool:
        """Whether all ranks agree at every step."""
        return self._world is self._inside

    def start(self, sums: Sums, maxima: Maxima) -> None:
        """Collective over the replica. Say a step's numbers without waiting."""
        pending = self.own_pace and self._under_way and not self._world.test()
        self._inside.start(sums, replace(maxima, pending=float(pending)))

    def wait(self) -> Heard:
        """Collective over the replica. What its ranks said."""
        return Heard(*self._inside.wait())

    def hear(
        self, step: int, own: Sums, maxima: Maxima, replica: Heard, done: bool
    ) -> Heard | None:
        """Collective. What all ranks said since the last time; None between.

        Args:
            step: Steps done; equal on all ranks, unless they go at their own pace.
            own: What this rank said at this step.
            maxima: Likewise.
            replica: What `wait` returned.
            done: Whether this was the last step; then nothing is left under way.
        """
        if self.in_step:
            return replica
        self._said = _add(self._said, own)
        if self.own_pace:
            return self._hear_at_own_pace(maxima, replica)
        if step % EVERY and not done:
            return None
        heard = Heard(*self._world.wait()) if self._under_way else None
        self._world.start(self._said, maxima)
        self._said, self._under_way = Sums(), True
        if done:
            last = self.drain()
            assert last is not None
            heard = last if heard is None else replace(last, sums=_add(heard.sums, last.sums))
        return heard

    def _hear_at_own_pace(self, maxima: Maxima, replica: Heard) -> Heard | None:
        if not self._under_way:
            self._world.start(self._said, maxima)
            self._said, self._under_way = Sums(), True
            return None
        if replica.maxima.pending:
            return None
        # The next one begins at the next step: what is decided on this one comes first.
        return self.drain()

    def drain(self) -> Heard | None:
        """Collective. Wait for the reduction under way, if any."""
        if not self._under_way:
            return None
        self._under_way = False
        return Heard(*self._world.wait())

    def reduce_max(self, vector: np.ndarray) -> None:
        """Collective. In-place maximum over all ranks, for waits outside the loop."""
        self._world.reduce_max(vector)

    def total(self, sums: Sums) -> Sums:
        """Collective. Sums over all ranks, outside the loop."""
        self.drain()
        self._world.start(sums, Maxima())
        return self._world.wait()[0]

    def ranks_with(self, condition: bool) -> list[int]:
        """Collective. The ranks on which `condition` holds."""
        self.drain()
        return self._world.ranks_with(condition)


def _add(before: Sums, after: Sums) -> Sums:
    values = {field.name: getattr(after, field.name) for field in fields(Sums)}
    values |= {name: getattr(before, name) + getattr(after, name) for name in _OF_STEPS}
    return Sums(**values)


def _duplicate(comm: Communicator) -> Communicator:
    duplicate = comm.split(0, comm.rank)
    assert duplicate is not None
    return duplicate
