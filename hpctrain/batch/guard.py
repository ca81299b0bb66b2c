"""What keeps a growing batch from harm that gradient noise does not foretell.

Takes a growth back that turned out badly (hpctrain/batch/retreat.py), and tests the half of a batch
at which the loss stands still (hpctrain/batch/plateau.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hpctrain.batch.plateau import Plateau
from hpctrain.batch.policy import Seen
from hpctrain.batch.retreat import Retreat
from hpctrain.state import State


class Advice(NamedTuple):
    """What to take, whatever noise and times say."""

    batch: int
    why: str
    """In plain words."""
    action: str
    """keep, retreat, test or shrink."""


@dataclass
class Guard:
    """Watches growths. Every method is local."""

    retreat: Retreat = field(default_factory=Retreat)
    plateau: Plateau = field(default_factory=Plateau)

    def advise(
        self, batch: int, seen: Seen, since: int, high: float, noise: str, rungs: Sequence[int]
    ) -> Advice | None:
        """None where nothing is amiss.

        Args:
            batch: The present one.
            seen: What is known.
            since: Steps since the last change.
            high: Upper end of B_S.
            noise: B_S in words.
            rungs: The batches there are.
        """
        tested = self.plateau.tested
        if tested is not None and tested in rungs:
            return self._in_a_test(tested, batch, seen, since)
        if self.retreat.mending(since):
            return Advice(batch, "it was gone back to lately, and mends", "keep")
        sank, rose = self.retreat.sank(high), self.retreat.rose(seen.losses, since)
        if sank or rose:
            why = f"{noise} is far below what the growth went by" if sank else "the loss rose"
            return Advice(self.retreat.take_back(batch, seen.samples), why, "retreat")
        grown, half = bool(self.retreat.growths), batch // 2
        if grown and half in rungs and self.plateau.stands(seen.losses, since, seen.samples):
            self.plateau.begin(batch, seen.losses, seen.samples)
            return Advice(half, "the loss stands still; a test, whether half of it helps", "test")
        return None

    def _in_a_test(self, tested: int, batch: int, seen: Seen, since: int) -> Advice:
        if not self.plateau.over(seen.losses, since):
            return Advice(batch, f"a test, whether the loss falls below that at {tested}", "keep")
        if not self.plateau.fell(seen.losses):
            return Advice(tested, "the loss did not fall in the test", "keep")
        self.retreat.bar(tested, batch, seen.samples)
        return Advice(batch, "the loss fell in the test", "shrink")

    def state(self) -> State:
        return State.nested({"retreat": self.retreat.state(), "plateau": self.plateau.state()})

    def load_state(self, state: State) -> None:
        self.retreat.load_state(state.below("retreat"))
        self.plateau.load_state(state.below("plateau"))
