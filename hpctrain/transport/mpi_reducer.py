"""Dense gradient sums by a background thread that calls MPI while backward computes.

The thread takes buckets in the order in which they start, so every rank makes the same calls in
the same order, on a communicator of its own. mpi4py releases Python's lock inside MPI.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import torch

from hpctrain.transport.communicator import Communicator
from hpctrain.transport.staging import Staged, Staging
from hpctrain.transport.verbs import timed
from hpctrain.transport.wire import BucketOrder, BucketSum, WireDtype, describe


class MpiReducer:
    """A `DenseReducer` over a `Communicator` that several threads may use. Collective.

    Without MPI_THREAD_MULTIPLE the sums run in `finish`, without overlap; `algorithm` says so.

    Args:
        comm: The ranks that take part; the reducer works on a duplicate.
        names: One name per bucket, for messages.
        wire_dtype: "native" (float32 or float64 buckets, MPI_Allreduce), or the half precision in
            which values travel as bytes (see `wire`).
    """

    name = "mpi"

    def __init__(
        self,
        comm: Communicator,
        *,
        names: Sequence[str],
        wire_dtype: WireDtype = "native",
    ) -> None:
        self.algorithm = describe(comm, wire_dtype)
        self.current = -1
        self._ledger = comm.ledger
        self._order = BucketOrder(names)
        self._staging = Staging(wire_dtype)
        duplicate = comm.split(0, comm.rank)
        assert duplicate is not None
        # The thread counts on its own: a ledger is not made for two threads at a time.
        duplicate.ledger = self._thread_ledger = type(comm.ledger)()
        self._sum = BucketSum(duplicate, wire_dtype)
        self._pending: list[Staged] = []
        self._tasks: queue.SimpleQueue[tuple[int, Staged] | None] = queue.SimpleQueue()
        self._progress = threading.Condition()
        self._n_done = 0
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if comm.any_thread:
            self._thread = threading.Thread(target=self._serve, name="mpi-reducer", daemon=True)
            self._thread.start()
        else:
            self.algorithm += ", no overlap (needs MPI_THREAD_MULTIPLE)"

    def start(self, index: int, bucket: torch.Tensor) -> None:
        self._order.check(index, bucket)
        staged = self._staging.leave(index, bucket)
        self._pending.append(staged)
        if self._thread is not None:
            self._tasks.put((index, staged))

    def finish(self) -> None:
        with timed(self._ledger):
            if self._thread is None:
                for index, staged in enumerate(self._pending):
                    self._run(index, staged)
            else:
                with self._progress:
                    self._progress.wait_for(self._is_settled)
        self.current = -1
        if self._error is not None:
            raise self._error
        for staged in self._pending:
            staged.arrive()
        self._pending.clear()
        self._n_done = 0
        self._order.restart()
        self._collect_bytes()

    def close(self) -> None:
        if self._thread is not None:
            self._tasks.put(None)
            # While an exception unwinds, buckets may be under way that will never complete.
            if not self._pending:
                self._thread.join()
            self._thread = None

    def _is_settled(self) -> bool:
        return self._error is not None or self._n_done == len(self._pending)

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._run(*task)
            except BaseException as error:  # finish() raises it in the main thread
                with self._progress:
                    self._error = error
                    self._progress.notify_all()
                return

    def _run(self, index: int, staged: Staged) -> None:
        self.current = index
        staged.sum_with(self._sum)
        with self._progress:
            self._n_done += 1
            self._progress.notify_all()

    def _collect_bytes(self) -> None:
        counted = self._thread_ledger
        self._ledger.add(
            intra=counted.bytes_sent_intra,
            inter=counted.bytes_sent_inter,
            source=counted.source,
        )
        counted.bytes_sent_intra = counted.bytes_sent_inter = 0
