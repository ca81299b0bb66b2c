"""All-gather of picked entries: every party sends its top k to all others, once.

    sent_m = the k entries of acc_m of largest magnitude
    update = sum over parties m of sent_m, in party order

Up to M k entries change. Bytes sent per party and step: k (M - 1) entries and M - 1 headers, the
least of all for two parties. Memory: M slots.

Source: Alistarh et al. 2018 (arXiv 1809.10505, Algorithm 1, TopK SGD), with error feedback.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np

from hpctrain.compress.feedback_device import AnyFeedback
from hpctrain.compress.select import NOTHING, Selector
from hpctrain.compress.wire import Coding, Header, Slot
from hpctrain.exchange.parties import Agreed
from hpctrain.state import Span
from hpctrain.transport.communicator import Communicator, Handle


class Gather:
    """The gather exchange of one shard.

    Args:
        n: Entries of the shard.
        size: Number of parties.
        coding: How entries travel.
        inbox: uint8, `inbox_bytes(...)` of the largest k that `set_count` will be given; in memory
            that all ranks of the party see.
        me: This party's number among those that exchange; None for a rank that only reads.
    """

    def __init__(
        self, n: int, size: int, coding: Coding, inbox: np.ndarray, me: int | None
    ) -> None:
        self._n, self._size, self._coding, self._inbox = n, size, coding, inbox
        self.set_count(0)

    @staticmethod
    def inbox_bytes(n: int, size: int, coding: Coding, k: int) -> int:
        """Bytes of the inbox for up to `k` entries per party."""
        return size * coding.slot_bytes(n, k)

    @staticmethod
    def sent_bytes(size: int, coding: Coding, k: int) -> float:
        """Bytes a party sends per step by formula, without headers."""
        return k * (size - 1) * coding.entry_bytes()

    def set_count(self, k: int) -> None:
        """Send k entries from now on. Equal on all parties."""
        self._k = k
        nbytes = self._coding.slot_bytes(self._n, k)
        self._arrived = self._inbox[: self._size * nbytes]
        self._outbox = np.zeros(nbytes, np.uint8)
        self._slots = slots_in(self._arrived, self._size, self._n, k, self._coding)
        self._out = Slot(self._outbox, self._n, k, self._coding)

    def exchange(
        self,
        step: int,
        bucket: int,
        feedback: AnyFeedback,
        selector: Selector,
        wanted: int,
        phases: Sequence[Communicator],
    ) -> Generator[Handle, None, Agreed]:
        """Collective over the parties. Pick, send, take; results are in the inbox at the end."""
        picked = feedback.pick(selector, self._k)
        header = Header(picked.finite, feedback.residual_sq, wanted)
        if picked.finite:
            feedback.take(picked.indices_K, self._out.write(step, bucket, picked, header))
        else:
            self._out.write(step, bucket, NOTHING, header)
        yield phases[0].iallgather(self._outbox, self._arrived)
        return agreed([slot.header(step, bucket) for slot in self._slots])

    def results(self, step: int, bucket: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions (K,) int64 in the shard and what to subtract there, one pair per party. Local.

        A position may come once per pair.
        """
        for slot in self._slots:
            _, indices, values = slot.read(step, bucket)
            yield indices, values

    def pending(self, start: int) -> tuple[np.ndarray, tuple[Span, ...]]:
        """Nothing waits outside `feedback`. Local."""
        return np.empty(0, np.float32), ()

    def undo(self) -> None:
        """Nothing outside `feedback` remembers this step. Local."""


def slots_in(memory: np.ndarray, size: int, n: int, capacity: int, coding: Coding) -> list[Slot]:
    """`size` slots one after another. Local."""
    nbytes = coding.slot_bytes(n, capacity)
    return [
        Slot(memory[part * nbytes : (part + 1) * nbytes], n, capacity, coding)
        for part in range(size)
    ]


def agreed(headers: Sequence[Header]) -> Agreed:
    """What one header per party says together. Local."""
    return Agreed(
        all(header.finite for header in headers),
        sum(header.residual_sq for header in headers),
        sum(header.wanted for header in headers) / len(headers),
    )
