"""Owner exchange: entries go to the owner of their part of the vector, sums come back.

    party m picks the k entries of acc_m of largest magnitude, sends each to its owner
    owner: pending <- pending + what arrived, in party order
           sent = the k / M entries of pending of largest magnitude;  pending <- pending - sent
    update = all owners' sent

Two rounds; k entries change. Owners hold blocks in turn (`cyclic`), so the number of entries for
one owner hardly varies: a slot has room for k/M + 4 sqrt(k/M) entries, and what does not fit stays
in the sender's residual. What an owner does not send waits in its own, `pending`. Bytes sent per
party and step: about 2 k (M - 1) / M entries. Memory: pending, n / M, and O(k).

The two phases are those of SparCML's split all-gather (Renggli et al. 2019, arXiv 1802.08021) and
of Ok-Topk (Li, Hoefler 2022, arXiv 2201.07598, section 3). Differences: a residual on the owner's
side in place of a global threshold, blocks in turn in place of balanced regions, constant sizes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np

from hpctrain.compress.feedback_device import AnyFeedback
from hpctrain.compress.select import NOTHING, Picked, Selector, largest
from hpctrain.compress.wire import Coding, Header, Slot
from hpctrain.exchange.cyclic import Cyclic
from hpctrain.exchange.gather import agreed, slots_in
from hpctrain.exchange.parties import Agreed
from hpctrain.state import Span
from hpctrain.transport.communicator import Communicator, Handle


class Owner:
    """The owner exchange of one shard. Arguments as of `Gather`."""

    def __init__(
        self, n: int, size: int, coding: Coding, inbox: np.ndarray, me: int | None
    ) -> None:
        self._size, self._coding, self._inbox, self._me = size, coding, inbox, me
        self.parts = Cyclic(n, size)
        self._n = self.parts.length(0)
        self.pending_N = np.zeros(0 if me is None else self.parts.length(me), np.float32)
        """What this owner has not sent: the shard's entries `parts.outside(me, ...)`."""
        self._before: list[tuple[np.ndarray, np.ndarray]] = []
        self.set_count(0)

    @staticmethod
    def inbox_bytes(n: int, size: int, coding: Coding, k: int) -> int:
        """Bytes of the inbox for up to `k` entries per party."""
        return size * coding.slot_bytes(Cyclic(n, size).length(0), -(-k // size))

    @staticmethod
    def sent_bytes(size: int, coding: Coding, k: int) -> float:
        """Bytes a party sends per step by formula, without headers and spare room."""
        return 2 * k * (size - 1) / size * coding.entry_bytes()

    def set_count(self, k: int) -> None:
        """Send k entries from now on. Equal on all parties."""
        size, n, coding = self._size, self._n, self._coding
        self._k, self._k_out = k, -(-k // size)
        nbytes = coding.slot_bytes(n, self._k_out)
        self._arrived = self._inbox[: size * nbytes]
        self._results = slots_in(self._arrived, size, n, self._k_out, coding)
        self._outbox = np.zeros(nbytes, np.uint8)
        self._out = Slot(self._outbox, n, self._k_out, coding)
        self._room = min(n, k, int(np.ceil(k / size + 4 * np.sqrt(k / size))))
        if self._me is not None:
            nbytes = size * coding.slot_bytes(n, self._room)
            self._to_owners, self._from_all = np.zeros((2, nbytes), np.uint8)
            self._requests = slots_in(self._to_owners, size, n, self._room, coding)
            self._offers = slots_in(self._from_all, size, n, self._room, coding)

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
        self._before = []
        picked = feedback.pick(selector, self._k)
        self._request(step, bucket, feedback, picked, wanted)
        yield phases[0].ialltoall(self._to_owners, self._from_all)
        offers = [offer.read(step, bucket) for offer in self._offers]
        all_finite = agreed([header for header, _, _ in offers]).finite
        sent = NOTHING
        if all_finite:
            for _, positions, values in offers:
                self._change(positions, values)
            sent = selector.pick(self.pending_N, self._k_out)
            all_finite = sent.finite
        header = Header(all_finite, feedback.residual_sq, wanted)
        written = self._out.write(step, bucket, sent if all_finite else NOTHING, header)
        if all_finite:
            self._change(sent.indices_K, -written)
        yield phases[1].iallgather(self._outbox, self._arrived)
        return agreed([slot.header(step, bucket) for slot in self._results])

    def results(self, step: int, bucket: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `Gather.results`, one pair per owner. Local."""
        for part, slot in enumerate(self._results):
            _, positions, values = slot.read(step, bucket)
            yield self.parts.outside(part, positions), values

    def pending(self, start: int) -> tuple[np.ndarray, tuple[Span, ...]]:
        """What is pending, and which entries those are if the shard begins at `start`. Local."""
        if self._me is None or not len(self.pending_N):
            return self.pending_N, ()
        parts, stop = self.parts, start + self.parts.n
        stride = parts.block * parts.parts
        return self.pending_N, (Span(start + self._me * parts.block, stop, parts.block, stride),)

    def undo(self) -> None:
        """Restore what is pending as it was before this step. Local."""
        for positions, values in reversed(self._before):
            self.pending_N[positions] = values
        self._before = []

    def _change(self, positions: np.ndarray, values: np.ndarray) -> None:
        """Add to what is pending (no position twice), so that `undo` can take it back."""
        before = self.pending_N[positions]
        self._before.append((positions, before))
        self.pending_N[positions] = before + values

    def _request(
        self, step: int, bucket: int, feedback: AnyFeedback, picked: Picked, wanted: int
    ) -> None:
        """Write each owner's slot and take from `feedback` what fits."""
        header = Header(picked.finite, feedback.residual_sq, wanted)
        if not picked.finite:
            picked = NOTHING
        for part, chosen in enumerate(self.parts.by_part(picked.indices_K)):
            mine = Picked(picked.indices_K.take(chosen), picked.values_K.take(chosen), finite=True)
            mine = largest(mine, self._room)
            entries = Picked(self.parts.inside(mine.indices_K), mine.values_K, finite=True)
            written = self._requests[part].write(step, bucket, entries, header)
            feedback.take(mine.indices_K, written)
