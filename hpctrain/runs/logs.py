"""Log files: one per rank, appended to by every attempt; warnings of rank 0 also go to stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpctrain.runs.durable import reason
from hpctrain.runs.folder import cannot_write

_ROOT = "hpctrain"
_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


class _File(logging.FileHandler):
    """Says once that the log cannot be written, instead of a traceback per line."""

    silent = False

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: told by handleError already
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not self.silent and error is not None:
            self.silent = True
            print(f"hpctrain: {self.baseFilename}: {reason(error)}", file=sys.stderr)


@contextmanager
def logging_to(path: Path, *, rank: int, size: int, attempt: int) -> Iterator[logging.Logger]:
    """Send this process's log to its rank's file. Local; one process per rank.

    Raises:
        WriteError: the file cannot be opened.
    """
    logger = logging.getLogger(_ROOT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers: list[logging.Handler] = [_File(path)]
    except OSError as error:
        raise cannot_write(path, error) from None
    handlers[0].setFormatter(logging.Formatter(_FORMAT))
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[1].setFormatter(logging.Formatter("hpctrain: %(message)s"))
        handlers[1].setLevel(logging.WARNING)
        handlers[1].addFilter(_without_traceback)
    old_level, old_propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        place = f"{socket.gethostname()}, process {os.getpid()}"
        logger.info("attempt %d: rank %d of %d on %s", attempt, rank, size, place)
        yield logger
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(old_level)
        logger.propagate = old_propagate


def _without_traceback(record: logging.LogRecord) -> bool:
    # The traceback is in the log file; a person at the terminal wants the sentence.
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        record.msg = f"{record.getMessage()}: {reason(error)}"
        record.args, record.exc_info, record.exc_text = None, None, None
    return True
