"""When the members of a rule meet: after steps of their own, of all together, or after seconds.

    steps:        every rank makes `every` steps
    total_steps:  all ranks together make `every` steps each on average; a fast one makes more
    seconds:      `every` seconds have passed since the last meeting

The last two go by what all ranks said when they last heard from each other (`agreement`), beside
the training: equal numbers on all of them, which reach each after another step of its own. All go
to the same meeting then; who comes first waits there, and nowhere else.

Source of total_steps: Teng et al. 2019, arXiv 1905.10395, algorithm 2, where a server counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hpctrain.state import Counter

Unit = Literal["steps", "total_steps", "seconds"]


@dataclass(frozen=True)
class Elapsed:
    """How far a rank and the run are."""

    step: int
    """Steps of this rank, with the one under way."""
    epoch: float
    total_steps: float = 0.0
    """Steps per rank, on average, as last heard from all."""
    seconds: float = 0.0
    """Of the run, as last heard from all."""

    def of(self, unit: Unit) -> float:
        """In that unit. Local."""
        return {"steps": self.step, "total_steps": self.total_steps, "seconds": self.seconds}[unit]


class Trigger:
    """Says when a meeting is due; the members agree.

    Args:
        unit: Of the period.
        period: Epoch -> how long between meetings.
    """

    def __init__(self, unit: Unit, period: Callable[[float], int]) -> None:
        self._unit, self._period = unit, period
        self._last = 0.0

    def due(self, now: Elapsed) -> bool:
        """Whether to meet after this step of this rank. Local."""
        return now.of(self._unit) - self._last >= self._period(now.epoch)

    def held(self, now: Elapsed) -> None:
        """The members have met. Local."""
        self._last = now.of(self._unit)

    def counters(self) -> dict[str, Counter]:
        """What a checkpoint keeps. Local."""
        return {"last_meeting": self._last}

    def load_counters(self, counters: Mapping[str, Counter]) -> None:
        """Take it back. Local."""
        self._last = float(counters["last_meeting"] or 0.0)
