"""Exclusive exchange: each party picks in a part of its own, all send their values there.

    at step t party m picks the k / M entries of acc_m of largest magnitude in part (m + t) mod M
    I = all picked positions;  sent_m = acc_m[I];  update = sum over parties of sent_m
    residual_m = acc_m - sent_m, which is 0 on I

Three rounds: positions to all; values, each to the party that picked its position, which adds them
in party order; sums to all. k entries change, the same on every party, so nothing piles up. Bytes
sent per party and step: k (M - 1) / M positions and 2 k (M - 1) / M values. A rounding error of a
sum stays with the party that added it. Memory: O(k).

The cheapest of the three to compute, but only 1 / M of the values that travel are large: the other
parties' values stand at positions that they did not choose. Even with twice the bytes it trained
more slowly than `gather` and `owner` (docs/benchmarks.md).

Parts that are exclusive and rotate are those of MiCRO (Yoon, Oh 2023, arXiv 2310.00967) and ExDyna
(Yoon, Oh 2024, arXiv 2402.13781). Differences: exactly k entries instead of a controlled
threshold, and values travel in half precision where `coding` says so.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np

from hpctrain.compress.feedback_device import AnyFeedback
from hpctrain.compress.select import NOTHING, Picked, Selector
from hpctrain.compress.wire import Coding, Header
from hpctrain.exchange.gather import agreed, slots_in
from hpctrain.exchange.parties import Agreed
from hpctrain.state import Span, shard_bounds
from hpctrain.transport.communicator import Communicator, Handle


class Exclusive:
    """The exclusive exchange of one shard. Arguments as of `Gather`."""

    def __init__(
        self, n: int, size: int, coding: Coding, inbox: np.ndarray, me: int | None
    ) -> None:
        self._size, self._inbox, self._me = size, inbox, me
        self._bounds = [shard_bounds(n, part, size) for part in range(size)]
        self._n = self._bounds[0][1]
        self._places = Coding(coding.index, "none")
        self._numbers = Coding("none", coding.value)
        self.set_count(0)

    @staticmethod
    def inbox_bytes(n: int, size: int, coding: Coding, k: int) -> int:
        """Bytes of the inbox for up to `k` entries per party."""
        part, each = shard_bounds(n, 0, size)[1], -(-k // size)
        places = Coding(coding.index, "none").slot_bytes(part, each)
        return size * (places + Coding("none", coding.value).slot_bytes(part, each))

    @staticmethod
    def sent_bytes(size: int, coding: Coding, k: int) -> float:
        """Bytes a party sends per step by formula, without headers."""
        values = Coding("none", coding.value).entry_bytes()
        return k * (size - 1) / size * (coding.entry_bytes() + values)

    def set_count(self, k: int) -> None:
        """Send k entries from now on. Equal on all parties."""
        self._k = -(-k // self._size)
        size, n, each = self._size, self._n, self._k
        places, numbers = (coding.slot_bytes(n, each) for coding in (self._places, self._numbers))
        self._where = self._inbox[: size * places]
        self._sums = self._inbox[size * places : size * (places + numbers)]
        self._place_slots = slots_in(self._where, size, n, each, self._places)
        self._sum_slots = slots_in(self._sums, size, n, each, self._numbers)
        if self._me is not None:
            self._my_places = np.zeros(places, np.uint8)
            self._my_sums = np.zeros(numbers, np.uint8)
            self._values, self._offers = np.zeros((2, size * numbers), np.uint8)

    def exchange(
        self,
        step: int,
        bucket: int,
        feedback: AnyFeedback,
        selector: Selector,
        wanted: int,
        phases: Sequence[Communicator],
    ) -> Generator[Handle, None, Agreed]:
        """Collective over the parties. As `Gather.exchange`."""
        assert self._me is not None
        size, n, each = self._size, self._n, self._k
        finite = feedback.prepare_all()
        start, stop = self._bounds[(self._me + step) % size]
        picked = feedback.pick(selector, each, start, stop) if finite else NOTHING
        header = Header(finite, feedback.residual_sq, wanted)
        (mine,) = slots_in(self._my_places, 1, n, each, self._places)
        mine.write(step, bucket, picked, header)
        yield phases[0].iallgather(self._my_places, self._where)
        read = [slot.read(step, bucket) for slot in self._place_slots]
        outcome = agreed([header for header, _, _ in read])
        if not outcome.finite:
            return outcome
        where = [self._shift(party, step) + indices for party, (_, indices, _) in enumerate(read)]
        for slot, indices in zip(
            slots_in(self._values, size, n, each, self._numbers), where, strict=True
        ):
            entries = Picked(indices, feedback.values(indices), finite=True)
            feedback.take(indices, slot.write(step, bucket, entries, header))
        yield phases[1].ialltoall(self._values, self._offers)
        total = np.zeros(len(where[self._me]), np.float32)
        for slot in slots_in(self._offers, size, n, each, self._numbers):
            total += slot.read(step, bucket)[2]
        (mine,) = slots_in(self._my_sums, 1, n, each, self._numbers)
        rounded = mine.write(step, bucket, Picked(where[self._me], total, finite=True), header)
        feedback.take(where[self._me], rounded - total)
        yield phases[2].iallgather(self._my_sums, self._sums)
        return outcome

    def results(self, step: int, bucket: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `Gather.results`, one pair per party. Local."""
        for party, (place, total) in enumerate(
            zip(self._place_slots, self._sum_slots, strict=True)
        ):
            indices = place.read(step, bucket)[1]
            yield self._shift(party, step) + indices, total.read(step, bucket)[2]

    def pending(self, start: int) -> tuple[np.ndarray, tuple[Span, ...]]:
        """Nothing waits outside `feedback`. Local."""
        return np.empty(0, np.float32), ()

    def undo(self) -> None:
        """Nothing outside `feedback` remembers this step. Local."""

    def _shift(self, party: int, step: int) -> int:
        return self._bounds[(party + step) % self._size][0]
