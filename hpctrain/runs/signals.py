"""Requests to stop early: signals, a deadline, a STOP file.

A handler only sets a flag: it runs between any two instructions of the program, so that even a
line of output in it can crash (a buffered writer entered twice). SIGUSR2 is never used: MPICH's
launcher dies of it.

The deadline rule. With `left` seconds to the earliest known end of the job, stop when

    left <= budget
    budget  = min(needed + reserve, max(total / 2, needed))
    needed  = save_s + 2 poll_s
    reserve = save_s + min(60 s, total / 10)

save_s: longest save so far; poll_s: longest time between two polls so far (a step, or an evaluation
between two steps), twice because the ranks agree one step late; total: the time from the start of
the process to its end. So normally the budget is twice a save, two steps and 60 s; a short walltime
shrinks the reserves, at most half of it is given up, and what a save needs is always left.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hpctrain.errors import UsageError

NONE, STOP_FILE, DEADLINE, USR1, TERM, INT = range(6)
"""Reasons, the most urgent last: the ranks agree on the maximum."""

_DESCRIPTIONS = {
    NONE: "not stopped",
    STOP_FILE: "the STOP file (hpctrain stop)",
    DEADLINE: "the deadline (--walltime or SLURM_JOB_END_TIME)",
    USR1: "SIGUSR1",
    TERM: "SIGTERM",
    INT: "Ctrl-C (SIGINT)",
}
_SIGNALS = {signal.SIGUSR1: USR1, signal.SIGTERM: TERM, signal.SIGINT: INT}
_FILE_EVERY_S = 2.0
_RESERVE_S = 60.0


def describe(code: int) -> str:
    """A reason code in words, for a sentence like "stopped by ...". Local."""
    return _DESCRIPTIONS[code]


def budget_s(save_s: float, poll_s: float, total_s: float) -> float:
    """Seconds before the deadline at which to stop; the module's docstring has the rule. Local."""
    needed = save_s + 2 * poll_s
    reserve = save_s + min(_RESERVE_S, total_s / 10)
    return min(needed + reserve, max(total_s / 2, needed))


def process_start_s() -> float:
    """When this process started, in seconds since the epoch. Local.

    Before Python and torch were imported, which takes up to a minute on a parallel file system.
    Where there is no /proc: now.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - max(uptime_s - ticks / os.sysconf("SC_CLK_TCK"), 0.0)


_early = NONE


def note_early_signals() -> None:
    """From here on SIGUSR1 does not kill; a `StopRequest` made later knows of it. Local.

    The first thing that a program does: schedulers send the signal up to a minute early, and to
    load torch and start MPI takes its time.
    """
    signal.signal(signal.SIGUSR1, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _early
    _early = USR1


class StopRequest:
    """Watches for reasons to stop; use it in a `with` block, which restores the old handlers.

    The first SIGUSR1, SIGTERM or Ctrl-C asks; a second Ctrl-C kills at once. Outside of the main
    thread (ranks as threads) Python allows no handlers; deadline and STOP file are still watched.

    Args:
        walltime_s: `--walltime`, from the start of the process; None for no limit.
        stop_file: on rank 0 the run folder's STOP file, None on the others.
        environment: where SLURM_JOB_END_TIME (seconds since the epoch) is looked up.

    Raises:
        UsageError: walltime_s is not positive.
    """

    def __init__(
        self,
        walltime_s: float | None = None,
        stop_file: Path | None = None,
        *,
        environment: Mapping[str, str] = os.environ,
        start_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if walltime_s is not None and walltime_s <= 0:
            raise UsageError(f"--walltime {walltime_s:g}: must be more than 0 seconds, e.g. 30m")
        self._clock = clock
        self._start_s = process_start_s() if start_s is None else start_s
        ends = [] if walltime_s is None else [self._start_s + walltime_s]
        slurm_end = environment.get("SLURM_JOB_END_TIME", "")
        if slurm_end.isdigit() and int(slurm_end) > 0:
            ends.append(float(slurm_end))
        self.end_s = min(ends) if ends else None
        """When the job ends, in seconds since the epoch; None if nobody said."""
        self._stop_file = stop_file
        self._signalled = _early
        self._found = NONE
        self._poll_s = 0.0
        self._last_poll_s: float | None = None
        self._last_look_s = float("-inf")
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            # None: a handler that was not installed from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old.clear()

    def poll(self, save_s: float) -> int:
        """The most urgent reason seen so far on this rank, to be max-reduced. Local.

        Call once per step. The STOP file is looked for at most every 2 s.

        Args:
            save_s: longest save so far (`Checkpointer.save_s`), 0 before any.
        """
        now = self._clock()
        if self._last_poll_s is not None:
            self._poll_s = max(self._poll_s, now - self._last_poll_s)
        self._last_poll_s = now
        if self._stop_file and now - self._last_look_s >= _FILE_EVERY_S:
            self._last_look_s = now
            if self._stop_file.exists():
                self._found = max(self._found, STOP_FILE)
        if self.end_s is not None:
            total_s = max(self.end_s - self._start_s, 0.0)
            if self.end_s - now <= budget_s(save_s, self._poll_s, total_s):
                self._found = max(self._found, DEADLINE)
        return max(self._found, self._signalled)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        code = _SIGNALS[signal.Signals(number)]
        if code == INT and self._signalled == INT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self._signalled = max(self._signalled, code)
