"""Background work whose progress all ranks can agree on without a message of its own.

Jobs are numbered alike on all ranks; at most one is under way. Two numbers per rank say how far it
is and which job failed last. Both only ever grow in the direction the maximum takes, so that a
maximum over the ranks which arrives late can delay a decision but never make it wrong.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from hpctrain.runs.durable import error_number, reason

log = logging.getLogger(__name__)

_RANKS = 1 << 24
_ERRORS = 1 << 8


class Jobs:
    """One rank's background jobs, one after the other."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.job = 0
        """Number of the last job begun."""
        self.problem = ""
        """Why this rank's last failed job failed, in its own words."""
        self._thread: threading.Thread | None = None
        self._done = 0
        self._failed = 0

    def begin(self, name: str, work: Callable[[], None] | None) -> None:
        """Start the next job; None where this rank has nothing to do in it. Local."""
        self.job += 1
        self._thread = None
        if work is None:
            self._done = self.job
            return
        # Daemon: a run that dies of an error must not wait for a slow disk.
        self._thread = threading.Thread(target=self._run, args=(name, work), name=name, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Block until this rank's part of the present job has ended. Local."""
        if self._thread:
            self._thread.join()

    def numbers(self) -> tuple[float, float]:
        """(progress, failure) to be max-reduced over the ranks. Local."""
        done = self._done  # read first: a job's failure is noted before its end
        return float(-done), float(self._failed)

    def ended(self, progress: float) -> bool:
        """Whether the present job has ended on all ranks, by the reduced progress. Local."""
        return -int(progress) >= self.job

    def failure(self, failed: float) -> str:
        """Who failed in the present job and why, "" if nobody, by the reduced failure. Local."""
        rest, rank = divmod(int(failed), _RANKS)
        job, number = divmod(rest, _ERRORS)
        if job != self.job:
            return ""
        if rank == self.rank:
            return f"rank {rank}: {self.problem}"
        return f"rank {rank}: {os.strerror(number) if number else 'see its log'}"

    def _run(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, the run must hear of it and decide
            log.exception("%s failed", name)
            self.problem = reason(error)
            number = min(error_number(error), _ERRORS - 1)
            # 2**53 leaves room for a million jobs: the numbers travel as float64.
            self._failed = (self.job * _ERRORS + number) * _RANKS + self.rank
        self._done = self.job
