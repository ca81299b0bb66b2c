"""Ranks as threads of one process, for tests, demonstrations and dry runs without MPI.

One rank runs at a time (see `baton`), so a run is repeatable and needs no locks. Semantics are
those of MPI at its strictest: a send is complete only when its receive was posted, every rank of a
communicator must call the same collectives in the same order (a mismatch is an error that names
the calls), and reductions add in rank order. Bytes are the ones that `mpi` would state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from hpctrain.transport.baton import Baton, DeadlockError, RankError
from hpctrain.transport.communicator import Communicator, Ledger
from hpctrain.transport.thread_communicator import ThreadCommunicator, ThreadGroup
from hpctrain.transport.topology import Topology
from hpctrain.transport.wire import BucketOrder, BucketSum, WireDtype, describe

__all__ = ["DeadlockError", "RankError", "ThreadCommunicator", "ThreadReducer", "run_threads"]

Result = TypeVar("Result")


def run_threads(
    size: int,
    fn: Callable[[Communicator], Result],
    *,
    node_of: Sequence[int] | None = None,
    interleave: Iterable[int] = (),
    only_waits: bool = False,
) -> list[Result]:
    """Run `fn(comm)` on `size` ranks and return the results in rank order.

    Every rank starts with the caller's random states; the caller's are restored at the end.

    Args:
        size: number of ranks.
        fn: what each rank does.
        node_of: rank -> label of its (pretended) node; all on one node by default.
        interleave: ranks to prefer at successive hand-overs, see `Baton`.
        only_waits: a rank runs until it must wait or polls, not only to its next call. The same
            results where nothing depends on who comes first, in a fraction of the time.

    Raises:
        RankError: a rank raised; its exception is the cause, the other ranks were released.
        DeadlockError: every rank waited for another one.
        ValueError: `node_of` does not have `size` entries.
    """
    if size < 1 or (node_of is not None and len(node_of) != size):
        raise ValueError(
            f"run_threads needs at least one rank and a node for each; got size {size} and "
            f"node_of {node_of}"
        )
    baton = Baton(size, interleave, only_waits=only_waits)
    group = ThreadGroup(baton, Topology.from_labels(node_of or [0] * size), tuple(range(size)))
    results: list[Any] = [None] * size

    def body(rank: int) -> None:
        results[rank] = fn(ThreadCommunicator(group, rank, Ledger()))

    baton.run([partial(body, rank) for rank in range(size)])
    return results


class ThreadReducer:
    """A `DenseReducer` over a `ThreadCommunicator`: buckets are summed in `finish`, in order.

    Args:
        comm: the ranks that take part.
        names: one name per bucket, for messages.
        wire_dtype: "native", or the half precision in which values travel (see `wire`).
    """

    name = "threads"

    def __init__(
        self, comm: Communicator, *, names: Sequence[str], wire_dtype: WireDtype = "native"
    ) -> None:
        self.algorithm = describe(comm, wire_dtype)
        self.current = -1
        self._order = BucketOrder(names)
        self._sum = BucketSum(comm, wire_dtype)
        self._started: list[torch.Tensor] = []

    def start(self, index: int, bucket: torch.Tensor) -> None:
        self._order.check(index, bucket)
        self._started.append(bucket)

    def finish(self) -> None:
        for index, bucket in enumerate(self._started):
            self.current = index
            self._sum.run(bucket)
        self._started.clear()
        self._order.restart()
        self.current = -1

    def close(self) -> None:
        self._started.clear()
