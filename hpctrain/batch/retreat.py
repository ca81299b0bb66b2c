"""Goes back to a smaller batch where a growth turns out badly.

A step size that grows with the batch meets a limit that gradient noise knows nothing of: beyond
about 2 / (largest curvature) the parameters swing across the valley. That shows in two ways.

    noise   the mean gradient grows and B_S = 1 + s2 / mu2 falls, often by a factor of 2 to 50: its
            interval comes to lie below `SUNK` times the lower end that the growth went by
    loss    the training loss rises: its mean over the `RECENT` last tellings, or those since the
            change, is above that of up to `EARLIER` before by more than `SIGMAS` standard errors

Either takes the last growth back, and that batch is barred until `PATIENCE` times the samples have
been seen: it is tried a logarithmic number of times, and the next one later. Neither is asked
within `MENDING` steps of going back, when what is measured is still of the larger batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from hpctrain.state import State

SUNK = 0.5
PATIENCE = 4
RECENT = 10
EARLIER = 30
SIGMAS = 4.0
MENDING = 30
_FEWEST = 5
"""Losses of either kind, without which nothing is said."""


@dataclass
class Retreat:
    """What is remembered of growths. Every method is local."""

    growths: list[tuple[int, float]] = field(default_factory=list)
    """(the batch before, lower end of B_S) of those that still hold, oldest first."""
    barred: int | None = None
    """The smallest batch that is not taken before ..."""
    until: int = 0
    """... so many samples have been seen; then it, and nothing above it."""
    went_back: bool = False
    """Whether the last change took a growth back."""

    def note(self, before: int, after: int, low: float, samples: int) -> None:
        """The batch changes by a decision on its own merit; `low` is the lower end of B_S."""
        self.went_back = False
        if after == self.barred:  # what it once took back, and above it nothing for as long again
            self.barred, self.until = 2 * after, PATIENCE * samples
        if after > before:
            self.growths.append((before, low))
        else:
            self.growths = [growth for growth in self.growths if growth[0] < after]

    def sank(self, high: float) -> bool:
        """Whether B_S, whose upper end is `high`, is far below what the last growth went by."""
        return bool(self.growths) and high < SUNK * self.growths[-1][1]

    def rose(self, losses: Sequence[tuple[int, float]], since: int) -> bool:
        """Whether the training loss went up since the last growth, or lately.

        Args:
            losses: `Seen.losses`.
            since: Steps since the last change.
        """
        told = [loss for _, loss in losses]
        latest = losses[-1][0] if losses else 0
        count = min(RECENT, max(sum(step > latest - since for step, _ in losses), 1))
        recent, earlier = told[-count:], told[-count - EARLIER : -count]
        if not self.growths or min(len(recent), len(earlier)) < _FEWEST:
            return False
        error = stdev(earlier) * (1.0 / len(recent) + 1.0 / len(earlier)) ** 0.5
        return bool(fmean(recent) > fmean(earlier) + SIGMAS * error)

    def mending(self, since: int) -> bool:
        """Whether the last change, `since` steps ago, was back to a batch, and lately."""
        return self.went_back and since < MENDING

    def take_back(self, batch: int, samples: int) -> int:
        """The last growth, to `batch`, is taken back; the batch before it."""
        before, _ = self.growths[-1]
        self.bar(batch, before, samples)
        self.went_back = True
        return before

    def bar(self, batch: int, taken: int, samples: int) -> None:
        """Nothing from `batch` on until `PATIENCE` times the samples; `taken` is taken instead."""
        self.barred, self.until = batch, PATIENCE * samples
        self.growths = [growth for growth in self.growths if growth[0] < taken]

    def allows(self, batch: int, samples: int) -> bool:
        """Whether a batch may be taken."""
        if self.barred is None or batch < self.barred:
            return True
        return batch == self.barred and samples >= self.until

    def state(self) -> State:
        counters = {"barred": self.barred, "until": self.until, "went_back": self.went_back}
        return State(counters={**counters, "growths": json.dumps(self.growths)})

    def load_state(self, state: State) -> None:
        counters = state.counters
        self.barred = None if counters["barred"] is None else int(counters["barred"])
        self.until = int(counters["until"] or 0)
        self.went_back = bool(counters["went_back"])
        growths = json.loads(str(counters["growths"]))
        self.growths = [(int(before), float(low)) for before, low in growths]
