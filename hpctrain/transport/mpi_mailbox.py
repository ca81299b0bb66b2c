"""A mailbox of polled two-sided messages: works alike on every MPI, without one-sided memory.

Nobody waits for anybody: `post` starts a send of a copy, `poll` takes what has arrived. MPI moves
messages only while a rank is inside an MPI call, so ranks that poll once per step are fast enough.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.transport.mpi import MPI
from hpctrain.transport.verbs import as_bytes, check_buffer, timed

if TYPE_CHECKING:
    from hpctrain.transport.mpi_communicator import MpiCommunicator

_Message = tuple[int, np.ndarray]


class MpiMailbox:
    """A `Mailbox`. Made by `MpiCommunicator.mailbox`.

    Args:
        owner: Counts bytes and seconds.
        comm: For this mailbox alone.
    """

    def __init__(self, owner: MpiCommunicator, comm: MPI.Intracomm) -> None:
        self._owner, self._comm = owner, comm
        self._leaving: list[tuple[MPI.Request, np.ndarray]] = []
        self._arriving: deque[tuple[MPI.Request, int, np.ndarray]] = deque()
        self._n_posted = np.zeros(owner.size, np.int64)
        self._n_arrived = np.zeros(owner.size, np.int64)

    def post(self, dest: int, payload: np.ndarray) -> None:
        check_buffer(payload)
        copy = as_bytes(payload).copy()
        with timed(self._owner.ledger):
            self._leaving = [send for send in self._leaving if not send[0].Test()]
            self._leaving.append((self._comm.Isend((copy, MPI.BYTE), dest), copy))
        self._n_posted[dest] += 1
        self._owner.count_message(dest, payload.nbytes)

    def poll(self) -> list[_Message]:
        with timed(self._owner.ledger):
            self._leaving = [send for send in self._leaving if not send[0].Test()]
            return self._take()

    def drain(self) -> list[_Message]:
        with timed(self._owner.ledger):
            expected = np.empty_like(self._n_posted)
            self._comm.Alltoall(self._n_posted, expected)
            messages = self._take()
            while self._leaving or (self._n_arrived < expected).any():
                self._leaving = [send for send in self._leaving if not send[0].Test()]
                messages += self._take()
        return messages

    def close(self) -> None:
        """Collective. Call `drain` before; messages left behind are lost."""
        self._comm.Free()

    def _take(self) -> list[_Message]:
        """Match what has arrived; return it in order of matching, complete messages only."""
        status = MPI.Status()
        while (message := self._comm.Improbe(status=status)) is not None:
            payload = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            # A large message's data may still be on the way: a blocking receive would wait.
            request = message.Irecv((payload, MPI.BYTE))
            self._arriving.append((request, status.Get_source(), payload))
        arrived: list[_Message] = []
        waiting: deque[tuple[MPI.Request, int, np.ndarray]] = deque()
        blocked: set[int] = set()
        for request, source, payload in self._arriving:
            if source not in blocked and request.Test():
                arrived.append((source, payload))
                self._n_arrived[source] += 1
            else:
                blocked.add(source)
                waiting.append((request, source, payload))
        self._arriving = waiting
        return arrived
