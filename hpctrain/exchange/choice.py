"""What each bucket does at a step: how many entries it sends, or that all of it is summed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.compress.feedback_device import AnyFeedback
from hpctrain.exchange.counts import Counts
from hpctrain.exchange.parties import Parties
from hpctrain.exchange.shards import Shards
from hpctrain.exchange.switch import Switch
from hpctrain.state import Counter
from hpctrain.transport.communicator import Communicator

if TYPE_CHECKING:
    from hpctrain.exchange.topk import TopkSettings


class Choice:
    """The choices of a run. Collective to make; equal on all ranks at every step.

    Args:
        config: The [exchange] table.
        shards: Their counts are set here.
        parties: Who compresses.
        comm: All ranks, for this object alone.
    """

    def __init__(
        self, config: TopkSettings, shards: Shards, parties: Parties, comm: Communicator
    ) -> None:
        self._always = [shards_[0].sparse is None for shards_ in shards.by_bucket]
        self.whole = list(self._always)
        """Which buckets are summed whole at this step."""
        self._counts = Counts(config, shards, parties)
        self._switch: Switch | None = None
        if not all(self._always):
            self._switch = config.make_switch(len(self._always), comm)
        self._began = time.perf_counter()

    @property
    def measures(self) -> bool:
        """Whether this step's buckets go one after another, to be timed."""
        return self._switch is not None and self._switch.measures

    @property
    def sums_in_gradients(self) -> bool:
        """Whether this step's sums lie where the next backward writes."""
        return self.whole != self._always

    def begin(self, step: int) -> None:
        """Decide a step. Local."""
        warming = self._counts.begin(step)
        modes = self._switch.whole if self._switch else [False] * len(self._always)
        self.whole = [
            always or warming or chosen for always, chosen in zip(self._always, modes, strict=True)
        ]

    def wanted(self, feedback: AnyFeedback) -> int:
        """How many entries this party would like to send of a shard. Local."""
        return self._counts.wanted(feedback)

    def settle(
        self,
        wanted: np.ndarray,
        exposed_s: float,
        exchange_s: Mapping[int, float],
        apply_s: Sequence[float],
    ) -> None:
        """Collective. Learn from the step that ended.

        Args:
            wanted: (buckets, places), agreed.
            exposed_s: What the step waited for the exchange.
            exchange_s: Seconds by bucket, where `measures`.
            apply_s: Seconds per bucket.
        """
        now = time.perf_counter()
        step_s = now - self._began
        self._counts.settle(wanted, step_s - exposed_s)
        if self._switch:
            of_bucket = [exchange_s.get(bucket, 0.0) for bucket in range(len(apply_s))]
            self._switch.settle(step_s, of_bucket, apply_s)
        self._began = now

    def tally(self) -> dict[str, float]:
        """Share of the steps' time that retries took. Local."""
        if self._switch is None or not self._switch.total_s:
            return {}
        return {"retry_share": self._switch.retry_s / self._switch.total_s}

    def counters(self) -> dict[str, Counter]:
        """What a checkpoint keeps. Local."""
        return self._counts.counters() | (self._switch.counters() if self._switch else {})

    def load_counters(self, counters: Mapping[str, Counter]) -> None:
        """Take stored choices. Local."""
        self._counts.load_counters(counters)
        if self._switch:
            self._switch.load_counters(counters)
