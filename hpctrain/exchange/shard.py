"""One shard of one bucket: where it lies, what exchanges it, and this rank's part in that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.compress.feedback_device import AnyFeedback
from hpctrain.exchange.buckets import Bucket
from hpctrain.exchange.exclusive import Exclusive
from hpctrain.exchange.gather import Gather
from hpctrain.exchange.owner import Owner
from hpctrain.state import shard_bounds

if TYPE_CHECKING:
    from hpctrain.exchange.topk import TopkSettings

Sparse = Gather | Exclusive | Owner
KINDS: dict[str, type[Gather] | type[Exclusive] | type[Owner]] = {
    "gather": Gather,
    "exclusive": Exclusive,
    "owner": Owner,
}
_ALIGN = 64


@dataclass(frozen=True)
class ShardPlan:
    """What all ranks know of a shard."""

    start: int
    stop: int
    """Entries [start, stop) of the flat vector."""
    count: int
    """Most entries that a party sends per step; 0: the shard is always summed whole."""
    inbox: slice
    """Bytes in the memory of the rank at the shard's place: messages, or the sum of a shard that is
    always summed whole."""

    @property
    def n(self) -> int:
        """Number of entries."""
        return self.stop - self.start


@dataclass
class Shard:
    """A shard on this rank."""

    plan: ShardPlan
    place: int
    """The ranks at this place of each party work on it."""
    sum_N: np.ndarray
    """Where a whole exchange leaves its sum: the inbox of a shard that is always summed whole, else
    the gradient of the rank at that place."""
    sparse: Sparse | None
    """None where the shard is always summed whole."""
    feedback: AnyFeedback | None = None
    """On the rank at that place."""
    count: int = 0
    """Entries that each party sends at this step, unless all are summed."""

    def set_count(self, count: int) -> None:
        """Send so many entries from now on; equal on all ranks. Local."""
        if self.sparse is not None and count != self.count:
            self.sparse.set_count(count)
            self.count = count


def plan_shards(
    config: TopkSettings,
    kind: str,
    density: float,
    buckets: Sequence[Bucket],
    small: Sequence[bool],
    parties: int,
    places: int,
    offset: int,
) -> list[list[ShardPlan]]:
    """Each bucket cut into one shard per place, with room for its messages. Local, pure.

    Args:
        config: The [exchange] table.
        kind: The sparse exchange.
        density: The largest there will be.
        buckets: In index order.
        small: Which of them are always summed whole.
        parties: How many compress.
        places: Shards per bucket.
        offset: Bytes before the first inbox.

    Returns:
        By bucket, then by place.
    """
    plans = []
    for bucket, whole in zip(buckets, small, strict=True):
        shards = []
        end = offset
        for place in range(places):
            start, stop = shard_bounds(bucket.stop - bucket.start, place, places)
            n = stop - start
            all_of_it = whole or parties == 1 or density == 1.0
            count = 0 if all_of_it else config.count(n, density)
            nbytes = KINDS[kind].inbox_bytes(n, parties, config.coding, count) if count else 4 * n
            inbox = slice(offset, offset + nbytes)
            shards.append(ShardPlan(bucket.start + start, bucket.start + stop, count, inbox))
            end = max(end, -(-inbox.stop // _ALIGN) * _ALIGN)
        plans.append(shards)
        offset = end
    return plans
