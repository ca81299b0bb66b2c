"""What methods see of the network: two protocols and a ledger of bytes and seconds.

`Communicator` (threads, mpi) moves numpy buffers between ranks; `DenseReducer` (threads, mpi, hvd,
nccl) sums gradient buckets while the backward pass still runs. No method imports MPI or Horovod.

Buffers are C-contiguous numpy arrays on the host; a torch CPU tensor goes in as `tensor.numpy()`
(no copy). Reductions take float32, float64, int32, int64 and uint8 and refuse half precision:
float16 and bfloat16 travel as bytes (`tensor.view(torch.uint8).numpy()`), because MPI libraries
either refuse to add them or add them wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from hpctrain.transport.topology import Topology

if TYPE_CHECKING:
    import torch

ReduceOp = Literal["sum", "max", "min"]
BytesSource = Literal["counted", "formula", "link"]
"""counted: added up where the bytes are handed over; formula: what the algorithm that ran sends by
its published formula (a library moves the bytes); link: read off the network interface."""


@dataclass
class Ledger:
    """Bytes this rank sent and seconds it spent in communication calls; shared by all its splits.

    `source` is the least certain source of anything added so far: "formula" wins over "counted".
    """

    bytes_sent_intra: int = 0
    bytes_sent_inter: int = 0
    seconds: float = 0.0
    source: BytesSource = "counted"

    def add(
        self, *, intra: int = 0, inter: int = 0, seconds: float = 0.0, source: BytesSource
    ) -> None:
        """Add bytes sent inside the node, between nodes, and seconds. Local."""
        self.bytes_sent_intra += intra
        self.bytes_sent_inter += inter
        self.seconds += seconds
        if source == "formula":
            self.source = "formula"


class Handle(Protocol):
    """A communication under way. Its buffers must not be touched until it is complete."""

    def test(self) -> bool:
        """True once complete; never blocks. Local."""
        ...

    def wait(self) -> None:
        """Block until complete. Local."""
        ...


class SharedWindow(Protocol):
    """Memory that every rank of one node reads and writes directly: one slice per rank."""

    slices: Sequence[np.ndarray]
    """uint8 arrays, one per rank of the communicator, aliasing the same physical memory."""

    def fence(self) -> None:
        """Collective. Stores made before it are visible to all ranks after it."""
        ...

    def close(self) -> None:
        """Collective. The slices must not be used afterwards."""
        ...


class Mailbox(Protocol):
    """Messages without a matching receive; nobody ever waits for anybody (sync rules' async forms).

    Messages from one source arrive in the order in which they were posted.
    """

    def post(self, dest: int, payload: np.ndarray) -> None:
        """Send a copy of `payload` (any dtype; arrives as uint8) to `dest`. Local, never blocks."""
        ...

    def poll(self) -> list[tuple[int, np.ndarray]]:
        """(source, uint8 payload) of every message that has arrived. Local, never blocks."""
        ...

    def drain(self) -> list[tuple[int, np.ndarray]]:
        """Collective. All messages posted to this rank before any rank called `drain`."""
        ...


class Communicator(Protocol):
    """A group of ranks. A verb is collective over them, in call order, unless it says Local."""

    rank: int
    size: int
    topology: Topology
    """Of this communicator's ranks (rank numbers are this communicator's)."""
    ledger: Ledger
    any_thread: bool
    """Whether any thread may call this communicator, while other threads call other ones."""
    algorithm: str
    """What runs an all-reduce, for people, as far as the library tells."""

    def barrier(self) -> None: ...

    def allreduce(self, buffer: np.ndarray, op: ReduceOp = "sum") -> None:
        """In place; the result is bitwise equal on all ranks."""
        ...

    def iallreduce(self, buffer: np.ndarray, op: ReduceOp = "sum") -> Handle:
        """As `allreduce`, without waiting."""
        ...

    def iallgather(self, send: np.ndarray, recv: np.ndarray) -> Handle:
        """`recv` (size * send.size entries) takes every rank's `send`, in rank order."""
        ...

    def ialltoall(self, send: np.ndarray, recv: np.ndarray) -> Handle:
        """Slice j of `send` goes to rank j; slice i of `recv` comes from rank i (equal slices)."""
        ...

    def allgather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order; lengths may differ, empty is legal."""
        ...

    def broadcast(self, buffer: np.ndarray, root: int, segment_bytes: int = 1 << 20) -> None:
        """`root`'s buffer to all, in place; each node's link carries it once.

        Segments travel down a chain of one rank per node, and inside each node from that rank.
        """
        ...

    def broadcast_bytes(self, payload: bytes | None, root: int) -> bytes:
        """`root`'s payload on every rank; the others pass None."""
        ...

    def isend(self, buffer: np.ndarray, dest: int, tag: int = 0) -> Handle:
        """Local."""
        ...

    def irecv(self, buffer: np.ndarray, source: int, tag: int = 0) -> Handle:
        """Local. The message must fill `buffer` exactly."""
        ...

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """Ranks with equal `color` form a communicator, ordered by (key, rank); None opts out."""
        ...

    def node(self) -> Communicator:
        """The ranks on this rank's node (collective the first time, then cached)."""
        ...

    def cross(self) -> Communicator:
        """The ranks with this rank's place inside their nodes (collective once, then cached).

        With uneven nodes, higher places exist on fewer nodes and their communicators are smaller.
        """
        ...

    def window(self, nbytes: int) -> SharedWindow:
        """Shared memory of `nbytes` for this rank (may differ by rank, 0 is legal).

        Raises:
            BackendError: the ranks of this communicator are not all on one node, or /dev/shm has
                too little room (checked before allocation; the message says how much it has).
        """
        ...

    def mailbox(self) -> Mailbox: ...


class DenseReducer(Protocol):
    """Sums gradient buckets over all ranks while backward still computes.

    Buckets are numbered 0..n-1 and every rank starts every bucket once per step in that order.
    """

    name: str
    """"horovod", "mpi", "nccl" or "threads"."""
    algorithm: str
    """What moves the bytes, as far as the library tells: e.g. "ring >= 1 MiB (Open MPI tuned)"."""

    @property
    def current(self) -> int:
        """The bucket that is being waited for, -1 when none; the watchdog's thread reads it."""
        ...

    def start(self, index: int, bucket: torch.Tensor) -> None:
        """Begin the in-place sum over ranks of a contiguous 1-D tensor. Collective.

        Returns at once; the tensor must not be touched before `finish`.
        """
        ...

    def finish(self) -> None:
        """Wait until every started bucket holds its sum. Collective."""
        ...

    def close(self) -> None:
        """Collective. End threads and free what was allocated."""
        ...
