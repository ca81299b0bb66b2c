"""The abort guard: a rank that fails says so once and takes all ranks down with it.

Plain mpi4py hangs for ever when one rank raises while the others wait for it (operations.md 5).
Knows MPI only as a function that aborts all ranks.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn

from hpctrain.errors import EXIT_INTERNAL, HpctrainError

_EXIT_INTERRUPTED = 130
_HEAD_START_S = 0.1
_LONGEST_HEAD_START_S = 1.0


def exit_code_of(error: BaseException) -> int:
    """The process's exit code for an exception. Local."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        return 1
    if isinstance(error, HpctrainError):
        return error.exit_code
    return _EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_INTERNAL


class AbortGuard:
    """Turns the failure of one rank into the end of all.

    Args:
        label: "rank 1/4 host", put before what is printed.
        rank: This rank; higher ranks wait a moment before they speak, so that an error which all
            ranks have is printed by the lowest.
        abort_all: Ends all ranks with an exit code, at once (MPI_Abort).
        all_leave: Blocks until all ranks have called it (True) or its patience ends (False).
    """

    def __init__(
        self,
        *,
        label: str,
        rank: int,
        abort_all: Callable[[int], None],
        all_leave: Callable[[], bool],
    ) -> None:
        self.before_abort: list[Callable[[int], None]] = []
        """Called with the exit code before all ranks end: MPI_Abort skips atexit."""
        self._label = label
        self._rank = rank
        self._abort_all = abort_all
        self._all_leave = all_leave
        self._lock = threading.Lock()

    def install(self) -> None:
        """Catch what escapes from the main thread and from every other one. Local."""
        sys.excepthook = self._on_exception
        threading.excepthook = self._on_thread_exception

    def abort(self, code: int, message: str | None = None) -> NoReturn:
        """Print `message` with this rank's label, flush, and end all ranks with `code`. Local."""
        # Only one thread may abort; a second one would cut the first one's message short.
        self._lock.acquire()
        time.sleep(min(_HEAD_START_S * self._rank, _LONGEST_HEAD_START_S))
        if message:
            lines = message.rstrip("\n").split("\n")
            print("\n".join(f"[{self._label}] {line}" for line in lines), file=sys.stderr)
        for callback in self.before_abort:
            with contextlib.suppress(Exception):
                callback(code)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self._abort_all(code or EXIT_INTERNAL)
        raise SystemExit(code or EXIT_INTERNAL)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Put around a program's main function. Local.

        An exception inside aborts all ranks. An exit with a non-zero code does so too, unless all
        ranks exit within a few seconds: then the code is kept and nothing is aborted.
        """
        try:
            yield
        except SystemExit as leaving:
            code = exit_code_of(leaving)
            if code and not self._all_leave():
                said = leaving.code if isinstance(leaving.code, str) else f"exits with code {code}"
                self.abort(code, f"{said} while other ranks go on; ending all ranks")
            raise
        except BaseException as error:  # whatever it is, the others must not wait
            self._report(error)

    def _report(self, error: BaseException) -> NoReturn:
        if isinstance(error, HpctrainError):
            text = f"{type(error).__name__}: {error}"
        else:
            text = "".join(traceback.format_exception(error))
        self.abort(exit_code_of(error), text)

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self._report(error)

    def _on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or isinstance(args.exc_value, SystemExit):
            return
        thread = args.thread.name if args.thread else "?"
        text = "".join(traceback.format_exception(args.exc_value))
        self.abort(exit_code_of(args.exc_value), f"in thread {thread}:\n{text}")
