"""Dense gradient sums by background threads that call MPI while backward computes.

Two threads, each on a communicator of its own, take turns: buckets 0, 2, 4, ... and 1, 3, 5, ...
Each takes its buckets in the order in which they start, so every rank makes the same calls in the
same order on each communicator. While one bucket waits for the slowest rank of a ring step, the
other uses the link. mpi4py releases Python's lock inside MPI.
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

_LANES = 2


class MpiReducer:
    """A `DenseReducer` over a `Communicator` that several threads may use. Collective.

    Without MPI_THREAD_MULTIPLE the sums run in `finish`, without overlap; `algorithm` says so.

    Args:
        comm: The ranks that take part; the reducer works on duplicates.
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
        self._ledger = comm.ledger
        self._order = BucketOrder(names)
        self._staging = Staging(wire_dtype)
        self._pending: list[Staged] = []
        self._progress = threading.Condition()
        self._lanes = [
            _Lane(comm, wire_dtype, self._progress) for _ in range(_LANES if comm.any_thread else 1)
        ]
        self._overlaps = comm.any_thread
        if self._overlaps:
            for lane in self._lanes:
                lane.start()
        else:
            self.algorithm += ", no overlap (needs MPI_THREAD_MULTIPLE)"

    @property
    def current(self) -> int:
        """The first bucket that is being summed, -1 when none."""
        return min((lane.current for lane in self._lanes if lane.current >= 0), default=-1)

    def start(self, index: int, bucket: torch.Tensor) -> None:
        self._order.check(index, bucket)
        staged = self._staging.leave(index, bucket)
        self._pending.append(staged)
        if self._overlaps:
            self._lanes[index % len(self._lanes)].tasks.put((index, staged))

    def finish(self) -> None:
        with timed(self._ledger):
            if self._overlaps:
                with self._progress:
                    self._progress.wait_for(self._is_settled)
            else:
                for index, staged in enumerate(self._pending):
                    self._lanes[0].run(index, staged)
        for lane in self._lanes:
            if lane.error is not None:
                raise lane.error
        for staged in self._pending:
            staged.arrive()
        self._pending.clear()
        self._order.restart()
        for lane in self._lanes:
            lane.n_done = 0
            self._collect_bytes(lane)

    def close(self) -> None:
        for lane in self._lanes:
            # While an exception unwinds, buckets may be under way that will never complete.
            lane.end(wait=not self._pending)

    def _is_settled(self) -> bool:
        done = sum(lane.n_done for lane in self._lanes)
        return done == len(self._pending) or any(lane.error for lane in self._lanes)

    def _collect_bytes(self, lane: _Lane) -> None:
        counted = lane.ledger
        self._ledger.add(
            intra=counted.bytes_sent_intra,
            inter=counted.bytes_sent_inter,
            source=counted.source,
        )
        counted.bytes_sent_intra = counted.bytes_sent_inter = 0


class _Lane:
    """One thread and its communicator; `progress` is notified of every end. Collective."""

    def __init__(
        self, comm: Communicator, wire_dtype: WireDtype, progress: threading.Condition
    ) -> None:
        duplicate = comm.split(0, comm.rank)
        assert duplicate is not None
        # The thread counts on its own: a ledger is not made for two threads at a time.
        duplicate.ledger = self.ledger = type(comm.ledger)()
        self.tasks: queue.SimpleQueue[tuple[int, Staged] | None] = queue.SimpleQueue()
        self.current = -1
        self.n_done = 0
        self.error: BaseException | None = None
        self._sum = BucketSum(duplicate, wire_dtype)
        self._progress = progress
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to take tasks. Local."""
        self._thread = threading.Thread(target=self._serve, name="mpi-reducer", daemon=True)
        self._thread.start()

    def end(self, *, wait: bool) -> None:
        """Take no more tasks. Local."""
        if self._thread is not None:
            self.tasks.put(None)
            if wait:
                self._thread.join()
            self._thread = None

    def run(self, index: int, staged: Staged) -> None:
        """Sum one bucket in the calling thread. Collective."""
        self.current = index
        staged.sum_with(self._sum)
        self.current = -1

    def _serve(self) -> None:
        while (task := self.tasks.get()) is not None:
            try:
                self.run(*task)
            except BaseException as error:  # finish() raises it in the main thread
                self.error = error
            with self._progress:
                self.n_done += self.error is None
                self._progress.notify_all()
            if self.error is not None:
                return
