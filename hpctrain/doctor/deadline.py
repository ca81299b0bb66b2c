"""Ends the examination if it does not come to its end: a hanging network must not hang doctor."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hpctrain.errors import EXIT_BACKEND

_LATER_S = 5.0


class Deadline:
    """A timer on every rank; the first rank speaks first.

    Args:
        rank: By the launcher.
        limit_s: After so long all ranks end with 69.
    """

    def __init__(self, rank: int, limit_s: float) -> None:
        self.doing = "local checks"
        """What this rank is at, for the message."""
        self.abort: Callable[[int], object] = os._exit
        """Ends all ranks; without MPI this process alone."""
        self._rank, self._limit_s = rank, limit_s
        # The others wait: rank 0's message tells what all ranks were at.
        self._own_limit_s = limit_s + _LATER_S * (rank > 0)
        self._timer = threading.Timer(self._own_limit_s, self._end)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Local. The end was reached."""
        self._timer.cancel()

    @contextmanager
    def starting_mpi(self) -> Iterator[None]:
        """Local. Put around MPI_Init, in which no Python thread runs, the timer's included.

        A process that does not come out of it ends with code 1 and its stack.
        """
        self.doing = "starting MPI"
        stream = sys.__stderr__
        if stream is None:
            yield
            return
        faulthandler.dump_traceback_later(self._own_limit_s + 1, exit=True, file=stream)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        text = (
            f"hpctrain: doctor was not done after {self._limit_s:.0f} s: rank {self._rank} was at "
            f"{self.doing}; the ranks cannot reach each other, or a file system hangs. --limit "
            "gives it more time\n"
        )
        if sys.__stderr__ is not None:
            sys.__stderr__.write(text)
            sys.__stderr__.flush()
        self.abort(EXIT_BACKEND)
