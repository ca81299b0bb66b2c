"""Holds the cost of measuring below a share of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hpctrain.control import Sums

COST_LIMIT = 0.01
"""Share of the time of steps that measuring may take."""


@dataclass
class Throttle:
    """Keeps the cost of measuring below `COST_LIMIT`: measures every `every`-th step. Local."""

    every: int = 1
    share: float = 0.0
    """Of the time of a step, over the last `_OVER` steps."""
    _from: Sums | None = None

    _OVER: ClassVar[int] = 50

    def hear(self, sums: Sums, ranks: int) -> None:
        """Take in what all ranks have spent so far; equal on all of them."""
        if self._from is None:
            self._from = sums
            return
        if sums.steps_timed - self._from.steps_timed < self._OVER * ranks:
            return
        spent_s = sums.measure_s - self._from.measure_s
        self.share = spent_s / max(sums.step_s - self._from.step_s, 1e-9)
        self._from = sums
        cost = self.share * self.every  # of measuring every step
        if self.share > COST_LIMIT:
            while cost > COST_LIMIT * self.every:
                self.every *= 2
        elif self.every > 1 and self.share < COST_LIMIT / 4:
            self.every //= 2
