"""A communicator among threads of one process; `threads.run_threads` makes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpctrain.errors import BackendError
from hpctrain.transport.baton import Baton
from hpctrain.transport.communicator import Handle, Ledger, Mailbox, ReduceOp, SharedWindow
from hpctrain.transport.thread_shared import ThreadMailbox, ThreadWindow
from hpctrain.transport.topology import Topology
from hpctrain.transport.verbs import (
    SharedVerbs,
    as_bytes,
    check_buffer,
    check_reduction,
    check_slices,
    timed,
)

_RELAY_TAG = -1
_UFUNCS: dict[ReduceOp, np.ufunc] = {"sum": np.add, "max": np.maximum, "min": np.minimum}


@dataclass
class _Meeting:
    """One collective call: what each rank brought, and what came out."""

    verb: str
    brought: dict[int, Any] = field(default_factory=dict)
    outcome: Any = None
    done: bool = False


@dataclass
class _Message:
    buffer: np.ndarray
    done: bool = False
    error: str = ""


_Queues = dict[tuple[int, int, int], deque[_Message]]
"""(source, destination, tag) -> messages in the order in which they were posted."""


@dataclass
class ThreadGroup:
    """What the ranks of one communicator share."""

    baton: Baton
    topology: Topology
    world_ranks: tuple[int, ...]
    meetings: dict[int, _Meeting] = field(default_factory=dict)
    sends: _Queues = field(default_factory=dict)
    receives: _Queues = field(default_factory=dict)


class _ThreadHandle:
    """Waits for a condition that another rank brings about."""

    def __init__(
        self,
        comm: ThreadCommunicator,
        ready: Callable[[], bool],
        what: Callable[[], str],
        message: _Message | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._comm, self._ready, self._what, self._message = comm, ready, what, message
        self._ledger = comm.ledger if ledger is None else ledger

    def test(self) -> bool:
        self._comm.yield_turn(polls=True)
        done = self._ready()
        if done:
            self._check()
        return done

    def wait(self) -> None:
        with timed(self._ledger):
            self._comm.wait_for(self._ready, self._what)
        self._check()

    def _check(self) -> None:
        if self._message is not None and self._message.error:
            raise ValueError(self._message.error)


class ThreadCommunicator(SharedVerbs):
    """A `Communicator` among threads of this process; made by `threads.run_threads`."""

    any_thread = False
    algorithm = "sum in rank order"

    def __init__(self, group: ThreadGroup, rank: int, ledger: Ledger) -> None:
        self.rank = rank
        self.size = group.topology.size
        self.topology = group.topology
        self.ledger = ledger
        self._group = group
        self._calls = 0
        self._untimed = Ledger()

    def yield_turn(self, *, polls: bool = False) -> None:
        """Let the other ranks run; where only waits hand over, if this one polls. Local."""
        self._group.baton.pass_on(self._group.world_ranks[self.rank], polls=polls)

    def wait_for(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Let the other ranks run until `ready()`. Local."""
        self._group.baton.wait(self._group.world_ranks[self.rank], ready, what)

    def barrier(self) -> None:
        self.meet("barrier", None, lambda brought: None)

    def allreduce(self, buffer: np.ndarray, op: ReduceOp = "sum") -> None:
        self._reduce("allreduce", buffer, op).wait()

    def iallreduce(self, buffer: np.ndarray, op: ReduceOp = "sum") -> Handle:
        return self._reduce("iallreduce", buffer, op)

    def iallgather(self, send: np.ndarray, recv: np.ndarray) -> Handle:
        check_slices(send, recv, size=self.size, verb="iallgather")
        self._count(self.topology.gather_bytes(self.rank, [send.nbytes] * self.size))

        def gather(brought: list[tuple[np.ndarray, np.ndarray]]) -> None:
            parts = [part.reshape(-1).copy() for part, _ in brought]
            for _, target in brought:
                np.concatenate(parts, out=target.reshape(-1))

        return self._begin(f"iallgather of {send.size} {send.dtype}", (send, recv), gather)[0]

    def ialltoall(self, send: np.ndarray, recv: np.ndarray) -> Handle:
        check_slices(send, recv, size=self.size, verb="ialltoall")
        self._count(self.topology.alltoall_bytes(self.rank, send.nbytes // self.size))

        def exchange(brought: list[tuple[np.ndarray, np.ndarray]]) -> None:
            sent = [part.reshape(self.size, -1).copy() for part, _ in brought]
            for rank, (_, target) in enumerate(brought):
                np.concatenate([part[rank] for part in sent], out=target.reshape(-1))

        return self._begin(f"ialltoall of {send.size} {send.dtype}", (send, recv), exchange)[0]

    def allgather_bytes(self, payload: bytes) -> list[bytes]:
        parts: list[bytes] = self.meet("allgather_bytes", bytes(payload), list)
        self._count(self.topology.gather_bytes(self.rank, [8] * self.size))
        self._count(self.topology.gather_bytes(self.rank, [len(part) for part in parts]))
        return list(parts)

    def isend(self, buffer: np.ndarray, dest: int, tag: int = 0) -> Handle:
        self.yield_turn()
        return self._send(buffer, dest, tag)

    def irecv(self, buffer: np.ndarray, source: int, tag: int = 0) -> Handle:
        self.yield_turn()
        return self._receive(buffer, source, tag)

    def relay_send(self, buffer: np.ndarray, dest: int) -> Handle:
        return self._send(buffer, dest, _RELAY_TAG, self._untimed)

    def relay_recv(self, buffer: np.ndarray, source: int) -> Handle:
        return self._receive(buffer, source, _RELAY_TAG, self._untimed)

    def split(self, color: int | None, key: int = 0) -> ThreadCommunicator | None:
        def form(brought: list[tuple[int | None, int]]) -> dict[int, tuple[ThreadGroup, int]]:
            places: dict[int, tuple[ThreadGroup, int]] = {}
            for chosen in {colour for colour, _ in brought if colour is not None}:
                members = [rank for rank, (colour, _) in enumerate(brought) if colour == chosen]
                members.sort(key=lambda rank: (brought[rank][1], rank))
                group = ThreadGroup(
                    self._group.baton,
                    self.topology.subset(members),
                    tuple(self._group.world_ranks[rank] for rank in members),
                )
                places.update({rank: (group, place) for place, rank in enumerate(members)})
            return places

        place = self.meet("split", (color, key), form).get(self.rank)
        if place is None:
            return None
        group, rank = place
        return ThreadCommunicator(group, rank, self.ledger)

    def window(self, nbytes: int) -> SharedWindow:
        if self.topology.n_nodes > 1:
            raise BackendError(
                f"a shared window needs all ranks on one node; these are "
                f"{self.topology.describe()}; use comm.node().window(...)"
            )
        slices = self.meet("window", nbytes, lambda sizes: [np.zeros(n, np.uint8) for n in sizes])
        return ThreadWindow(self, slices)

    def mailbox(self) -> Mailbox:
        boxes = self.meet("mailbox", None, lambda brought: [deque() for _ in brought])
        return ThreadMailbox(self, boxes)

    def count_post(self, dest: int, nbytes: int) -> None:
        """Count a message. Local."""
        intra, inter = self.topology.to_peer_bytes(self.rank, dest, nbytes)
        self.ledger.add(intra=intra, inter=inter, source="counted")

    def _count(self, sent: tuple[int, int]) -> None:
        self.ledger.add(intra=sent[0], inter=sent[1], source="formula")

    def _reduce(self, verb: str, buffer: np.ndarray, op: ReduceOp) -> Handle:
        check_reduction(buffer, op)
        self._count(self.topology.ring_bytes(self.rank, buffer.nbytes))

        def reduce(brought: list[np.ndarray]) -> None:
            total = brought[0].copy()
            for part in brought[1:]:
                _UFUNCS[op](total, part, out=total)
            for target in brought:
                target[...] = total

        return self._begin(f"{verb}({op}) of {buffer.size} {buffer.dtype}", buffer, reduce)[0]

    def meet(self, verb: str, contribution: Any, compute: Callable[[list[Any]], Any]) -> Any:
        """Collective. `compute` of every rank's contribution, computed once and shared."""
        handle, meeting = self._begin(verb, contribution, compute)
        handle.wait()
        return meeting.outcome

    def _begin(
        self, verb: str, contribution: Any, compute: Callable[[list[Any]], Any]
    ) -> tuple[Handle, _Meeting]:
        self.yield_turn()
        number, self._calls = self._calls, self._calls + 1
        meetings = self._group.meetings
        meeting = meetings.setdefault(number, _Meeting(verb))
        if meeting.verb != verb:
            others = ", ".join(map(str, sorted(meeting.brought)))
            raise RuntimeError(
                f"ranks call different collectives (call {number} of this communicator): rank "
                f"{self.rank} {verb}, rank(s) {others} {meeting.verb}"
            )
        meeting.brought[self.rank] = contribution
        if len(meeting.brought) == self.size:
            meeting.outcome = compute([meeting.brought[rank] for rank in range(self.size)])
            meeting.done = True
            del meetings[number]

        def what() -> str:
            missing = [rank for rank in range(self.size) if rank not in meeting.brought]
            return f"in {verb} (call {number}) for rank(s) {', '.join(map(str, missing))}"

        return _ThreadHandle(self, lambda: meeting.done, what), meeting

    def _send(
        self, buffer: np.ndarray, dest: int, tag: int, ledger: Ledger | None = None
    ) -> Handle:
        message = self._message(buffer, dest)
        self.count_post(dest, buffer.nbytes)
        key = (self.rank, dest, tag)
        if partner := _take(self._group.receives, key):
            _deliver(message, partner)
        else:
            self._group.sends.setdefault(key, deque()).append(message)
        label = f"for rank {dest} to receive {buffer.nbytes} bytes (tag {tag})"
        return _ThreadHandle(self, lambda: message.done, lambda: label, None, ledger)

    def _receive(
        self, buffer: np.ndarray, source: int, tag: int, ledger: Ledger | None = None
    ) -> Handle:
        message = self._message(buffer, source)
        key = (source, self.rank, tag)
        if partner := _take(self._group.sends, key):
            _deliver(partner, message)
        else:
            self._group.receives.setdefault(key, deque()).append(message)
        label = f"for {buffer.nbytes} bytes from rank {source} (tag {tag})"
        return _ThreadHandle(self, lambda: message.done, lambda: label, message, ledger)

    def _message(self, buffer: np.ndarray, peer: int) -> _Message:
        check_buffer(buffer)
        if not 0 <= peer < self.size:
            raise ValueError(f"ranks of this communicator are 0 to {self.size - 1}; got {peer}")
        return _Message(as_bytes(buffer))


def _take(queues: _Queues, key: tuple[int, int, int]) -> _Message | None:
    queue = queues.get(key)
    return queue.popleft() if queue else None


def _deliver(sent: _Message, received: _Message) -> None:
    if sent.buffer.size == received.buffer.size:
        received.buffer[...] = sent.buffer
    else:
        received.error = (
            f"a message must fill its buffer exactly: {sent.buffer.size} bytes arrived for a "
            f"buffer of {received.buffer.size}"
        )
    sent.done = received.done = True
