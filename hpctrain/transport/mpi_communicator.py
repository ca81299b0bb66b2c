"""The communicator over mpi4py; `mpi.start()` makes the first one.

Bytes: point-to-point messages, broadcasts and mailboxes are counted where they are handed over; for
what the library moves the formula is that of the ring all-reduce, the ring all-gather and the
pairwise all-to-all (`Topology`), whatever the library ran.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from hpctrain.transport.communicator import Handle, Ledger, ReduceOp
from hpctrain.transport.mpi import MPI
from hpctrain.transport.mpi_mailbox import MpiMailbox
from hpctrain.transport.mpi_window import MpiWindow
from hpctrain.transport.topology import Topology
from hpctrain.transport.verbs import (
    SharedVerbs,
    as_bytes,
    check_buffer,
    check_reduction,
    check_slices,
    timed,
)

_RELAY_TAG, _FIRST_USER_TAG = 0, 1
_OPS: dict[ReduceOp, MPI.Op] = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}


class MpiHandle:
    """A request under way, with the buffers it needs alive.

    Args:
        request: The request.
        ledger: Takes the seconds spent waiting.
        expected_bytes: Size that a received message must have; None for other requests.
        keep: Buffers in use.
    """

    def __init__(
        self,
        request: MPI.Request,
        ledger: Ledger,
        *keep: np.ndarray,
        expected_bytes: int | None = None,
    ) -> None:
        self._request, self._ledger, self._keep = request, ledger, keep
        self._expected_bytes = expected_bytes
        self._done = False

    def test(self) -> bool:
        if not self._done:
            with timed(self._ledger):
                self._finish(wait=False)
        return self._done

    def wait(self) -> None:
        if not self._done:
            with timed(self._ledger):
                self._finish(wait=True)

    def _finish(self, *, wait: bool) -> None:
        status = MPI.Status()
        try:
            if wait:
                self._request.Wait(status)
                self._done = True
            else:
                self._done = self._request.Test(status)
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                raise
            self._refuse("more")
        if self._done:
            self._keep = ()
            if self._expected_bytes is not None:
                arrived = status.Get_count(MPI.BYTE)
                if arrived != self._expected_bytes:
                    self._refuse(str(arrived))

    def _refuse(self, arrived: str) -> None:
        self._done = True
        raise ValueError(
            f"a message must fill its buffer exactly: {arrived} bytes arrived for a buffer of "
            f"{self._expected_bytes}"
        )


class MpiCommunicator(SharedVerbs):
    """A `Communicator` over mpi4py.

    Args:
        comm: For this object alone: nothing else communicates over it.
        topology: Of its ranks.
        ledger: Takes bytes and seconds.
        algorithm: What runs an all-reduce, for people.
    """

    def __init__(
        self, comm: MPI.Intracomm, topology: Topology, ledger: Ledger, algorithm: str
    ) -> None:
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.topology = topology
        self.ledger = ledger
        self.algorithm = algorithm
        self.any_thread = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._comm = comm
        self._untimed = Ledger()

    def barrier(self) -> None:
        with timed(self.ledger):
            self._comm.Barrier()

    def allreduce(self, buffer: np.ndarray, op: ReduceOp = "sum") -> None:
        check_reduction(buffer, op)
        with timed(self.ledger):
            self._comm.Allreduce(MPI.IN_PLACE, buffer, _OPS[op])
        self._count(self.topology.ring_bytes(self.rank, buffer.nbytes))

    def iallreduce(self, buffer: np.ndarray, op: ReduceOp = "sum") -> Handle:
        check_reduction(buffer, op)
        with timed(self.ledger):
            request = self._comm.Iallreduce(MPI.IN_PLACE, buffer, _OPS[op])
        self._count(self.topology.ring_bytes(self.rank, buffer.nbytes))
        return MpiHandle(request, self.ledger, buffer)

    def iallgather(self, send: np.ndarray, recv: np.ndarray) -> Handle:
        check_slices(send, recv, size=self.size, verb="iallgather")
        with timed(self.ledger):
            request = self._comm.Iallgather(_mpi_bytes(send), _mpi_bytes(recv))
        self._count(self.topology.gather_bytes(self.rank, [send.nbytes] * self.size))
        return MpiHandle(request, self.ledger, send, recv)

    def ialltoall(self, send: np.ndarray, recv: np.ndarray) -> Handle:
        check_slices(send, recv, size=self.size, verb="ialltoall")
        with timed(self.ledger):
            request = self._comm.Ialltoall(_mpi_bytes(send), _mpi_bytes(recv))
        self._count(self.topology.alltoall_bytes(self.rank, send.nbytes // self.size))
        return MpiHandle(request, self.ledger, send, recv)

    def allgather_bytes(self, payload: bytes) -> list[bytes]:
        lengths = np.empty(self.size, np.int64)
        with timed(self.ledger):
            self._comm.Allgather(np.array([len(payload)], np.int64), lengths)
            counts = [int(length) for length in lengths]
            starts = [0, *accumulate(counts)]
            gathered = bytearray(starts[-1])
            self._comm.Allgatherv([payload, MPI.BYTE], [gathered, (counts, starts[:-1]), MPI.BYTE])
        self._count(self.topology.gather_bytes(self.rank, [8] * self.size))
        self._count(self.topology.gather_bytes(self.rank, counts))
        return [
            bytes(gathered[start : start + count])
            for start, count in zip(starts, counts, strict=False)
        ]

    def isend(self, buffer: np.ndarray, dest: int, tag: int = 0) -> Handle:
        with timed(self.ledger):
            return self._send(buffer, dest, tag + _FIRST_USER_TAG)

    def irecv(self, buffer: np.ndarray, source: int, tag: int = 0) -> Handle:
        with timed(self.ledger):
            return self._receive(buffer, source, tag + _FIRST_USER_TAG)

    def relay_send(self, buffer: np.ndarray, dest: int) -> Handle:
        return self._send(buffer, dest, _RELAY_TAG, self._untimed)

    def relay_recv(self, buffer: np.ndarray, source: int) -> Handle:
        return self._receive(buffer, source, _RELAY_TAG, self._untimed)

    def split(self, color: int | None, key: int = 0) -> MpiCommunicator | None:
        colours = np.array([-1 if color is None else color, key], np.int64)
        if color is not None and color < 0:
            raise ValueError(f"split colours are None or at least 0; got {color}")
        with timed(self.ledger):
            everyone = np.empty((self.size, 2), np.int64)
            self._comm.Allgather(colours, everyone)
            members = [rank for rank in range(self.size) if everyone[rank, 0] == colours[0]]
            members.sort(key=lambda rank: (int(everyone[rank, 1]), rank))
            group = MPI.UNDEFINED if color is None else members[0]
            comm = self._comm.Split(group, members.index(self.rank))
        if color is None:
            return None
        assert isinstance(comm, MPI.Intracomm)
        return MpiCommunicator(comm, self.topology.subset(members), self.ledger, self.algorithm)

    def window(self, nbytes: int) -> MpiWindow:
        return MpiWindow(self, self._comm, nbytes)

    def mailbox(self) -> MpiMailbox:
        return MpiMailbox(self, self._comm.Dup())

    def _send(
        self, buffer: np.ndarray, dest: int, tag: int, ledger: Ledger | None = None
    ) -> MpiHandle:
        check_buffer(buffer)
        self.count_message(dest, buffer.nbytes)
        request = self._comm.Isend(_mpi_bytes(buffer), dest, tag)
        return MpiHandle(request, ledger or self.ledger, buffer)

    def _receive(
        self, buffer: np.ndarray, source: int, tag: int, ledger: Ledger | None = None
    ) -> MpiHandle:
        check_buffer(buffer)
        request = self._comm.Irecv(_mpi_bytes(buffer), source, tag)
        return MpiHandle(request, ledger or self.ledger, buffer, expected_bytes=buffer.nbytes)

    def count_message(self, dest: int, nbytes: int) -> None:
        """Count a message that is handed over for `dest`. Local."""
        intra, inter = self.topology.to_peer_bytes(self.rank, dest, nbytes)
        self.ledger.add(intra=intra, inter=inter, source="counted")

    def _count(self, sent: tuple[int, int]) -> None:
        self.ledger.add(intra=sent[0], inter=sent[1], source="formula")


def _mpi_bytes(buffer: np.ndarray) -> tuple[np.ndarray, MPI.Datatype]:
    return as_bytes(buffer), MPI.BYTE
