"""metrics.jsonl: a JSON line per logged step, evaluation, checkpoint and note; units in `FIELDS`.

Lines are complete or absent, in step order, each step once: on resume the lines of steps after the
checkpoint are cut off. Unknown is null. A number that is inf or NaN is null too, since JSON has no
such numbers, and its text stands under `non_finite`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import Field

from hpctrain.errors import WriteError
from hpctrain.runs.durable import reason, write_durably
from hpctrain.runs.folder import cannot_write
from hpctrain.table import DurationS, Table

log = logging.getLogger(__name__)

Kind = Literal["step", "eval", "checkpoint", "note"]
Line = dict[str, Any]

_ALWAYS = {
    "kind": ("", "step, eval, checkpoint or note"),
    "time_s": ("s", "when the line was written, since the epoch of 1970"),
    "attempt": ("", "which start of the run wrote it, from 1"),
    "step": ("steps", "optimiser steps done"),
    "samples": ("samples", "training samples taken over all ranks"),
    "epoch": ("epochs", "passes over the training set, with fraction"),
}
_PER_STEP = "mean per step since the previous step line"
FIELDS: dict[Kind, dict[str, tuple[str, str]]] = {
    "step": {
        **_ALWAYS,
        "loss": (
            "",
            "mean training loss of this step's global batch, before its update; with "
            "[[sync]] over the steps since the previous line, each replica at its own",
        ),
        "accuracy": ("", "fraction of this step's global batch that was classified correctly"),
        "lr": ("", "step size of this step"),
        "batch_global": ("samples", "samples of this step over all ranks"),
        "step_s": ("s", f"duration, {_PER_STEP}"),
        "compute_s": ("s", f"forward, backward and update, mean over ranks, {_PER_STEP}"),
        "exchange_s": ("s", f"waiting for the exchange, mean over ranks, {_PER_STEP}"),
        "sync_s": ("s", f"reconciling parameters ([[sync]]), mean over ranks, {_PER_STEP}"),
        "input_s": ("s", f"waiting for data, mean over ranks, {_PER_STEP}"),
        "bytes_sent_intra": ("bytes", f"sent inside nodes, sum over ranks, {_PER_STEP}"),
        "bytes_sent_inter": ("bytes", f"sent between nodes, sum over ranks, {_PER_STEP}"),
        "bytes_source": ("", "counted, formula or link: where the byte counts come from"),
        "density": ("", "fraction of the gradient's entries that each node (or rank) sent"),
        "residual_norm": ("", "Euclidean norm of all residuals before this step, every 10 steps"),
        "xi": ("", "of Alistarh et al. 2018, assumption 1, on the steps where it is measured"),
        "retry_share": ("", "share of the time spent trying the slower form (exchange auto)"),
        "bytes_formula": ("bytes", "that a node sends per step by the exchange's formula"),
        "sync": ("", "numbers of each [[sync]] rule's last meeting, RULE.NAME (docs/sync.md)"),
        "regulariser": ("", "numbers of each [[regulariser]], KIND.NAME (docs/regularisers.md)"),
        "samples_per_s": ("samples/s", "over all ranks, since the previous step line"),
    },
    "eval": {
        **_ALWAYS,
        "loss": ("", "mean loss over the held-out set, at the average of all replicas"),
        "accuracy": ("", "fraction of it that was classified correctly, at that average"),
        **{
            f"replica_{what}_{which}": ("", f"{which} over replicas, each at its own parameters")
            for what in ("loss", "accuracy")
            for which in ("min", "mean", "max")
        },
        "leader_loss": ("", "of the replica that leads"),
        "leader_accuracy": ("", "of the replica that leads"),
        "eval_s": ("s", "duration of the evaluation"),
    },
    "checkpoint": {
        **_ALWAYS,
        "ok": ("", "whether it is complete on disk"),
        "saved_step": ("steps", "the step it holds"),
        "stall_s": ("s", "how long training stood still for it (rank 0)"),
        "save_s": ("s", "from the copy to the moment all ranks knew it complete (rank 0)"),
        "bytes_written": ("bytes", "tensor bytes rank 0 wrote"),
        "reason": ("", "why it failed"),
    },
    "note": {**_ALWAYS, "text": ("", "a remark, such as where a run was resumed")},
}
"""Per kind of line: field -> (unit, meaning). Every line has all the fields of its kind."""

_PENDING_LINES = 10_000


class RecordConfig(Table):
    """The table [record]: what a run writes down and shows."""

    every_steps: int = Field(default=10, ge=1)
    """A line in metrics.jsonl every so many steps (and for the first and last step)."""
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    """What is shown: a live bar, plain lines, nothing but the summary; auto takes the bar for a
    person at a terminal, else plain lines (docs/operations.md has the rule)."""
    plain_every_s: DurationS = Field(default=5.0, gt=0)
    """Seconds between two plain lines."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder (needs the tensorboard extra)."""


class Recorder:
    """Appends to metrics.jsonl; rank 0 only. Use it in a `with` block.

    Each line is flushed to the operating system at once. When the disk is full, lines (the last
    10,000) wait in memory and are written as soon as there is room.

    Args:
        path: the file.
        attempt: of the run folder.
        step: where this attempt starts: 0, or the step of the checkpoint it continues from. Lines
            of later steps are cut off.

    Raises:
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path, *, attempt: int = 1, step: int = 0) -> None:
        self.path = path
        self.attempt = attempt
        self._pending: list[bytes] = []
        self._warned = False
        try:
            self.cut_lines = _cut(path, step)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from None

    def write(self, kind: Kind, step: int, **fields: Any) -> Line:
        """Append a line with the given fields, null for the rest of `FIELDS[kind]`. Local.

        Returns:
            The line as a dictionary, the numbers as they were given.

        Raises:
            ValueError: a field that is not in `FIELDS[kind]`.
        """
        unknown = set(fields) - set(FIELDS[kind])
        if unknown:
            raise ValueError(f"{kind} lines have no {sorted(unknown)}; see record.FIELDS")
        given = {"kind": kind, "time_s": time.time(), "attempt": self.attempt, "step": step}
        line: Line = dict.fromkeys(FIELDS[kind]) | given | fields
        self._append(to_json(line).encode() + b"\n")
        return line

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

    def __enter__(self) -> Recorder:
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
