"""How many entries each shard sends, step by step: fixed, in warm-up, or tuned."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.compress.feedback_device import AnyFeedback
from hpctrain.exchange.density import Compressor, SecondCost
from hpctrain.exchange.parties import Parties
from hpctrain.exchange.probe import second_cost
from hpctrain.exchange.shard import KINDS
from hpctrain.exchange.tuned import TunedDensity, Warmup
from hpctrain.state import Counter

if TYPE_CHECKING:
    from hpctrain.exchange.shards import Shards
    from hpctrain.exchange.topk import TopkSettings

_SAMPLE = 1 << 16
_TIMED_STEPS = 5


class Counts:
    """Sets the counts of all shards, equal on all ranks, since agreed numbers decide.

    Args:
        config: The [exchange] table.
        shards: All shards.
        parties: Who compresses.
    """

    def __init__(self, config: TopkSettings, shards: Shards, parties: Parties) -> None:
        self._config, self._shards, self._parties = config, shards, parties
        self._warmup = warmup_of(config, shards.kind, parties.count)
        self._compute_s: list[float] = []
        self._tuned: TunedDensity | None = None
        if config.tune is not None and config.tune.cost != "seconds":
            self._tuned = self._make_tuned(0.0)
        self._follows = False

    def begin(self, step: int) -> bool:
        """Set the counts of a step. Whether warm-up sums everything at this step. Local."""
        density = self._warmup.density_at(step)
        warming = step < self._config.warmup_steps
        if density < 1.0 and (warming or not self._follows):
            for shards in self._shards.by_bucket:
                for shard in shards:
                    shard.set_count(self._config.count(shard.plan.n, density))
        return density == 1.0

    def wanted(self, feedback: AnyFeedback) -> int:
        """How many entries this party would like to send of a shard. Local."""
        if self._tuned is None:
            return 0
        stride = max(1, feedback.n // _SAMPLE)
        return self._tuned.propose(np.abs(feedback.sample(slice(None, None, stride))), feedback.n)

    def settle(self, wanted: np.ndarray, compute_s: float) -> None:
        """Take over what the parties wanted on average, for the next step. Local, or collective.

        Args:
            wanted: (buckets, places).
            compute_s: Seconds of the step outside the exchange.
        """
        if self._config.tune is None:
            return
        if self._tuned is None:
            self._compute_s.append(compute_s)
            if len(self._compute_s) == _TIMED_STEPS:
                self._tuned = self._make_tuned(statistics.median(self._compute_s))
            return
        for shards, means in zip(self._shards.by_bucket, wanted, strict=True):
            for shard, mean in zip(shards, means, strict=True):
                if mean > 0:
                    shard.set_count(min(shard.plan.count, max(1, round(mean))))
        self._follows = True

    def counters(self) -> dict[str, Counter]:
        """Counts that follow the gradient, as text. Local."""
        if not self._follows:
            return {}
        rows = (",".join(str(s.count) for s in shards) for shards in self._shards.by_bucket)
        return {"counts": ";".join(rows)}

    def load_counters(self, counters: Mapping[str, Counter]) -> None:
        """Take stored counts, if they are of as many shards. Local."""
        text = str(counters.get("counts", ""))
        rows = [row.split(",") for row in text.split(";")]
        by_bucket = self._shards.by_bucket
        if [len(row) for row in rows] == [len(shards) for shards in by_bucket] and text:
            for shards, row in zip(by_bucket, rows, strict=True):
                for shard, count in zip(shards, row, strict=True):
                    shard.set_count(min(int(count), shard.plan.count))
            self._follows = True

    def _make_tuned(self, compute_s: float) -> TunedDensity:
        """Collective where seconds count: they are measured."""
        config, tune = self._config, self._config.tune
        assert tune is not None
        seconds = SecondCost(0.0, 0.0)
        if tune.cost == "seconds":
            across = self._parties.phases[0]
            seconds = second_cost(across, self._shards.kind, config.coding, compute_s)
        compressor: Compressor = "sign" if config.values == "sign" else "top"
        return TunedDensity(
            tune.cost_of(seconds),
            tune.lowest,
            tune.highest,
            compressor,
            index_bits=8 * config.coding.index_bytes,
            value_bits=32 if compressor == "sign" else config.coding.value_bits,
        )


def warmup_of(config: TopkSettings, kind: str, parties: int) -> Warmup:
    """The warm-up of these settings. Local."""

    def volume(density: float) -> float:
        sent = KINDS[kind].sent_bytes(parties, config.coding, 1_000_000)
        return density * sent / (8e6 * (parties - 1) / parties) if parties > 1 else 0.0

    return Warmup(config.density, config.warmup_steps, volume)


def largest_density(config: TopkSettings, kind: str, parties: int) -> float:
    """The largest density below 1 of a run, for which messages need room. Local."""
    stages = [density for density in warmup_of(config, kind, parties).stages if density < 1.0]
    highest = config.tune.highest if config.tune else 0.0
    return max(config.density, highest, *stages)
