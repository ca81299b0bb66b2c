"""Carries the buckets of a step through the phases of their exchange while backward computes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

from hpctrain.transport.communicator import Handle

Task = Iterator[Handle]
"""One bucket's exchange: yields whatever must be complete before it goes on. A phase is what lies
between two yields."""

_POLL_S = 2e-4


class _Running:
    """A task that has begun."""

    def __init__(self, index: int, task: Task) -> None:
        self.index = index
        self.phase = 0
        self.handle: Handle | None = None
        self._task = task
        self.advance()

    def advance(self) -> None:
        """Run the next phase."""
        self.handle = next(self._task, None)
        self.phase += 1


class Lane:
    """Runs tasks side by side in one thread. Collective, since tasks communicate.

    Tasks begin in the order of `start`. A task enters a phase only when those before it have
    entered theirs, so that all ranks make the calls of one phase in the same order; each phase
    needs a communicator of its own. While backward runs nothing waits for one task alone: ranks
    that are ahead must not keep others from beginning the buckets that these wait for.

    Args:
        threaded: Run in a background thread; else everything runs in `finish`.
    """

    def __init__(self, *, threaded: bool) -> None:
        self.current = -1
        self.in_turn = False
        """Run tasks one after another in `finish`, timed; to be set before the first `start`."""
        self.seconds: dict[int, float] = {}
        """Of each task that ran in turn."""
        self._begun: list[_Running] = []
        self._waiting: list[tuple[int, Task]] = []
        self._queue: queue.SimpleQueue[tuple[int, Task] | bool] = queue.SimpleQueue()
        self._drained = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._serve, name="exchange-lane", daemon=True)
            self._thread.start()

    def start(self, index: int, task: Task) -> None:
        """Begin a task, without waiting."""
        if self._thread and not self.in_turn:
            self._queue.put((index, task))
        else:
            self._waiting.append((index, task))

    def finish(self) -> None:
        """Wait until every task has ended."""
        if self._error is not None:
            raise self._error
        if self._thread and not self.in_turn:
            self._queue.put(True)
            self._drained.wait()
            self._drained.clear()
            if self._error is not None:
                raise self._error
        else:
            for index, task in self._waiting:
                began = time.perf_counter()
                self._begin(index, task)
                if self.in_turn:
                    self._drain()
                    self.seconds[index] = time.perf_counter() - began
            self._waiting.clear()
            self._drain()

    def close(self) -> None:
        """End the thread. Local."""
        if self._thread:
            self._queue.put(False)
            if self._error is None and not self._begun:
                self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=_POLL_S if self._begun else None)
            except queue.Empty:
                item = None
            try:
                if item is False:
                    return
                if item is True:
                    self._drain()
                    self._drained.set()
                elif item is not None:
                    self._begin(*item)
                self._poll()
            except BaseException as error:  # finish() raises it in the main thread
                self._error = error
                self._drained.set()
                return

    def _begin(self, index: int, task: Task) -> None:
        self.current = self._begun[0].index if self._begun else index
        self._begun.append(_Running(index, task))
        self._tidy()

    def _poll(self) -> None:
        """Advance every task whose turn it is and whose handle is complete."""
        furthest = None
        for running in self._begun:
            while (
                running.handle is not None
                and (furthest is None or running.phase < furthest)
                and running.handle.test()
            ):
                running.advance()
            if running.handle is not None:
                furthest = running.phase if furthest is None else min(furthest, running.phase)
        self._tidy()

    def _drain(self) -> None:
        while self._begun:
            first = self._begun[0]
            if first.handle is not None:
                first.handle.wait()
                first.advance()
            self._poll()

    def _tidy(self) -> None:
        self._begun = [running for running in self._begun if running.handle is not None]
        self.current = self._begun[0].index if self._begun else -1
