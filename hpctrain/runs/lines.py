"""Files of JSON lines that grow while a run goes on: complete lines, in step order, each step once.

A number that is inf or NaN is null, since JSON has no such numbers, and its text stands under
`non_finite`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from hpctrain.errors import WriteError
from hpctrain.runs.durable import reason, write_durably
from hpctrain.runs.folder import cannot_write

log = logging.getLogger(__name__)

Line = dict[str, Any]
Lines = TypeVar("Lines", bound="JsonLines")

_PENDING_LINES = 10_000


class JsonLines:
    """Appends lines to a file; rank 0 only. Use it in a `with` block.

    Each line is flushed to the operating system at once. When the disk is full, lines (the last
    10,000) wait in memory and are written as soon as there is room.

    Args:
        path: the file.
        step: where this attempt starts: 0, or the step of the checkpoint it continues from. Lines
            of later steps are cut off.

    Raises:
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path, *, step: int = 0) -> None:
        self.path = path
        self._pending: list[bytes] = []
        self._warned = False
        try:
            self.cut_lines = _cut(path, step)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from None

    def append(self, line: Line) -> None:
        """Write a line. Local."""
        self._append(to_json(line).encode() + b"\n")

    def close(self) -> None:
        """Flush to the disk and close. Local.

        Raises:
            WriteError: lines are left that could not be written.
        """
        if self._file < 0:
            return
        self._append(b"")
        try:
            os.fsync(self._file)
        except OSError as error:
            log.warning("%s: %s", self.path, reason(error))
        os.close(self._file)
        self._file = -1
        if self._pending:
            raise WriteError(
                f"{self.path}: {len(self._pending)} lines could not be written (disk full?); the "
                "checkpoints are not affected"
            )

    def __enter__(self: Lines) -> Lines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, data: bytes) -> None:
        if data:
            self._pending = [*self._pending[1 - _PENDING_LINES :], data]
        if not self._pending:
            return
        block = b"".join(self._pending)
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, block)
            if written < len(block):
                # A disk that fills up takes a part: half a line must not stay.
                os.ftruncate(self._file, before)
                raise OSError(28, os.strerror(28), str(self.path))
        except OSError as error:
            if not self._warned:
                log.warning("%s: %s; lines wait in memory", self.path, reason(error))
            self._warned = True
        else:
            self._pending, self._warned = [], False


def to_json(line: Line) -> str:
    """A line as JSON text: inf and NaN become null, their names go under `non_finite`. Local."""
    odd = {k: v for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    if odd:
        texts = {key: str(value) for key, value in odd.items()}
        line = {**line, **dict.fromkeys(odd), "non_finite": texts}
    return json.dumps(line, allow_nan=False)


def read(path: Path) -> Iterator[Line]:
    """The lines of a record, in order, without an incomplete last line. Local.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    with open(path, "rb") as file:
        for raw in file:
            line = _parse(raw)
            if line is not None:
                yield line


def _parse(raw: bytes) -> Line | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _cut(path: Path, step: int) -> int:
    """Drop lines of steps after `step` and damaged ones; how many."""
    if not path.exists():
        return 0
    kept, dropped = [], 0
    with open(path, "rb") as file:
        for raw in file:
            line = _parse(raw)
            if line is not None and line.get("step", 0) <= step:
                kept.append(raw)
            else:
                dropped += 1
    if dropped:
        write_durably(path, b"".join(kept))
    return dropped
