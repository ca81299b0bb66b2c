"""Verbs that both communicators share: checks of buffers, and what is made of simpler verbs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from hpctrain.transport.communicator import Communicator, Handle, Ledger, ReduceOp
from hpctrain.transport.topology import Topology

_SEGMENTS_AHEAD = 4
"""Broadcast segments that are posted before the oldest is complete: enough to keep a link busy."""

REDUCIBLE = ("float32", "float64", "int32", "int64", "uint8")


def check_buffer(buffer: np.ndarray) -> None:
    """Refuse what cannot be sent without a copy. Local.

    Raises:
        TypeError: not a numpy array.
        ValueError: not C-contiguous.
    """
    if not isinstance(buffer, np.ndarray):
        raise TypeError(
            f"a communicator moves numpy arrays; got {type(buffer).__name__}; "
            "pass tensor.detach().numpy() of a CPU tensor"
        )
    if not buffer.flags.c_contiguous:
        raise ValueError(
            f"a communicator moves C-contiguous buffers; got strides {buffer.strides} for shape "
            f"{buffer.shape}; pass a contiguous copy and write the result back"
        )


def check_reduction(buffer: np.ndarray, op: ReduceOp) -> None:
    """Refuse reductions that MPI libraries cannot do or do wrongly. Local.

    Raises:
        TypeError: the dtype is not in `REDUCIBLE`.
        ValueError: not contiguous, or an unknown `op`.
    """
    check_buffer(buffer)
    if op not in ("sum", "max", "min"):
        raise ValueError(f'a reduction is "sum", "max" or "min"; got "{op}"')
    if buffer.dtype.name not in REDUCIBLE or not buffer.dtype.isnative:
        raise TypeError(
            f"reductions take {', '.join(REDUCIBLE)}; got {buffer.dtype}; half precision travels "
            "as bytes (exchange.wire_dtype) because MPI libraries add it wrongly"
        )


def check_slices(send: np.ndarray, recv: np.ndarray, *, size: int, verb: str) -> None:
    """Check the buffers of an all-gather ("iallgather") or all-to-all ("ialltoall"). Local.

    Raises:
        ValueError: dtypes differ, or the lengths do not fit.
    """
    check_buffer(send)
    check_buffer(recv)
    expected = send.size * size if verb == "iallgather" else send.size
    if send.dtype != recv.dtype or recv.size != expected:
        raise ValueError(
            f"{verb} over {size} ranks of {send.size} entries of {send.dtype} needs a receive "
            f"buffer of {expected} of the same dtype; got {recv.size} of {recv.dtype}"
        )
    if verb == "ialltoall" and send.size % size:
        raise ValueError(
            f"ialltoall needs equal slices: {send.size} entries are not divisible by {size} ranks"
        )


def as_bytes(buffer: np.ndarray) -> np.ndarray:
    """The same memory as a flat uint8 array. Local."""
    return buffer.reshape(-1).view(np.uint8) if buffer.size else np.empty(0, np.uint8)


@contextmanager
def timed(ledger: Ledger) -> Iterator[None]:
    """Add the block's wall time to the ledger's seconds. Local."""
    started_s = time.perf_counter()
    try:
        yield
    finally:
        ledger.seconds += time.perf_counter() - started_s


class SharedVerbs(ABC):
    """Broadcasts over point-to-point messages, and the node and cross communicators.

    A communicator derives from it and offers `relay_send` and `relay_recv`: untimed, counted
    messages that cannot be confused with the caller's own `isend` and `irecv`.
    """

    rank: int
    size: int
    topology: Topology
    ledger: Ledger
    _node: Communicator | None = None
    _cross: Communicator | None = None

    @abstractmethod
    def relay_send(self, buffer: np.ndarray, dest: int) -> Handle:
        """Begin to send uint8 data. Local."""

    @abstractmethod
    def relay_recv(self, buffer: np.ndarray, source: int) -> Handle:
        """Begin to receive uint8 data. Local."""

    @abstractmethod
    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """As `Communicator.split`. Collective."""

    def broadcast(self, buffer: np.ndarray, root: int, segment_bytes: int = 1 << 20) -> None:
        """As `Communicator.broadcast`. Collective. Bytes are counted."""
        check_buffer(buffer)
        if not 0 <= root < self.size or segment_bytes < 1:
            raise ValueError(
                f"broadcast needs a root from 0 to {self.size - 1} and segments of at least one "
                f"byte; got root {root}, segment_bytes {segment_bytes}"
            )
        with timed(self.ledger):
            self._relay(as_bytes(buffer), root, segment_bytes)

    def broadcast_bytes(self, payload: bytes | None, root: int) -> bytes:
        """As `Communicator.broadcast_bytes`. Collective. Bytes are counted, the length's 8 too."""
        if not 0 <= root < self.size or (payload is None) == (self.rank == root):
            raise ValueError(
                f"broadcast_bytes takes a root from 0 to {self.size - 1}, its payload there and "
                f"None elsewhere; got root {root} and "
                f"{'None' if payload is None else 'a payload'} on rank {self.rank}"
            )
        with timed(self.ledger):
            length = np.array([len(payload or b"")], np.int64)
            self._relay(as_bytes(length), root, length.nbytes)
            if payload is None:
                data = np.empty(int(length[0]), np.uint8)
            else:
                data = np.frombuffer(payload, np.uint8)
            self._relay(data, root, 1 << 20)
        return data.tobytes()

    def node(self) -> Communicator:
        """As `Communicator.node`. Collective the first time."""
        if self._node is None:
            self._node = self.split(self.topology.node_of[self.rank], self.rank)
        assert self._node is not None
        return self._node

    def cross(self) -> Communicator:
        """As `Communicator.cross`. Collective the first time."""
        if self._cross is None:
            self._cross = self.split(self.topology.local_rank(self.rank), self.rank)
        assert self._cross is not None
        return self._cross

    def _relay(self, data: np.ndarray, root: int, segment_bytes: int) -> None:
        source, destinations = self.topology.broadcast_route(self.rank, root)
        segments = [data[at : at + segment_bytes] for at in range(0, data.size, segment_bytes)]
        receiving: deque[Handle] = deque()
        sending: deque[Handle] = deque()
        for index, segment in enumerate(segments):
            if source is not None:
                ahead = index + len(receiving)
                for later in segments[ahead : index + _SEGMENTS_AHEAD]:
                    receiving.append(self.relay_recv(later, source))
                receiving.popleft().wait()
            sending.extend(self.relay_send(segment, dest) for dest in destinations)
            while len(sending) > _SEGMENTS_AHEAD * len(destinations):
                sending.popleft().wait()
        for handle in sending:
            handle.wait()
