"""When a training has arrived: an accuracy or a loss, held in two evaluations in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """`measure` is "accuracy" (at least) or "loss" (at most)."""

    measure: str
    value: float

    @staticmethod
    def parse(text: str) -> Target:
        """ "accuracy:0.9" or "loss:1.8"."""
        measure, _, value = text.partition(":")
        if measure not in ("accuracy", "loss"):
            raise ValueError(f"{text}: accuracy:VALUE or loss:VALUE")
        return Target(measure, float(value))

    def __str__(self) -> str:
        return f"{self.measure}:{self.value:g}"

    @property
    def column(self) -> int:
        """Where the measure stands in (step, loss, accuracy)."""
        return 2 if self.measure == "accuracy" else 1

    def met(self, loss: float, accuracy: float) -> bool:
        """Whether one evaluation is good enough."""
        return accuracy >= self.value if self.measure == "accuracy" else loss <= self.value

    def reached_at(self, curve: Sequence[Sequence[float]]) -> int | None:
        """The first step of (step, loss, accuracy) that is good enough, as is the next one."""
        met = [self.met(loss, accuracy) for _, loss, accuracy in curve]
        for number in range(len(curve) - 1):
            if met[number] and met[number + 1]:
                return int(curve[number][0])
        return None
