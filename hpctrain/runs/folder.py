"""The run folder: what is where in it, which one a start uses, and its status file.

    config.toml  env.json           resolved configuration; versions, hosts, topology, git
    status.json                     state, step, attempt, process; replaced in one step
    metrics.jsonl                   the record (record.py)
    batch_plan.jsonl                what the batch policy decided (plan.py)
    logs/rank-00000.log             one per rank (logs.py)
    checkpoints/step-00000100/      (manifest.py)
    STOP                            its presence asks the run to stop

Rank 0 chooses and writes; the others receive path and attempt (`RunFolder.to_bytes`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpctrain.errors import UsageError, WriteError
from hpctrain.runs import manifest
from hpctrain.runs.durable import reason, write_durably
from hpctrain.runs.status import Status, is_running, read_status, this_process

log = logging.getLogger(__name__)

_STATUS_EVERY_S = 5.0


@dataclass
class RunFolder:
    """Paths inside one run folder, and its status file.

    `attempt` counts the starts of this run from 1 and names temporary checkpoint folders.
    """

    path: Path
    attempt: int = 1
    _written_s: float = float("-inf")

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def environment(self) -> Path:
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plan(self) -> Path:
        return self.path / "batch_plan.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def stop_file(self) -> Path:
        return self.path / "STOP"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def log(self, rank: int) -> Path:
        """Log file of one rank. Local."""
        return log_path(self.path, rank)

    def to_bytes(self) -> bytes:
        """For the broadcast from rank 0. Local."""
        return json.dumps([str(self.path), self.attempt]).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> RunFolder:
        """The inverse of `to_bytes`. Local."""
        path, attempt = json.loads(payload)
        return cls(Path(path), attempt)

    def begin(self, config_text: str, environment: Mapping[str, Any]) -> None:
        """Write config.toml and env.json, remove an old STOP, and say "running". Local, rank 0.

        What an earlier attempt wrote differently is kept as `config.attempt-1.toml` and the like.

        Raises:
            WriteError: the folder cannot be written.
        """
        environment_text = json.dumps(environment, indent=1, default=str) + "\n"
        try:
            for path in (self.checkpoints, self.path / "logs"):
                path.mkdir(parents=True, exist_ok=True)
            self._replace(self.config, config_text)
            self._replace(self.environment, environment_text)
            self.stop_file.unlink(missing_ok=True)
            old = read_status(self.path)
            place = (old.step, old.samples, old.epoch) if old else (0, 0, 0.0)
            self._write("running", *place, None)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def running(self, step: int, samples: int, epoch: float) -> None:
        """Bring status.json up to date, at most every 5 s. Local, rank 0.

        A full disk is logged and does not end the run: whether it may go on is the checkpoints'
        business (`checkpoint.on_error`).
        """
        if time.monotonic() - self._written_s >= _STATUS_EVERY_S:
            self._try_to_write("running", step, samples, epoch, None)

    def end(
        self,
        state: Literal["stopped", "complete", "failed"],
        step: int,
        samples: int,
        epoch: float,
        exit_code: int,
    ) -> None:
        """Write how the run ended. Local, rank 0. A full disk is logged."""
        self._try_to_write(state, step, samples, epoch, exit_code)

    def _replace(self, path: Path, text: str) -> None:
        if path.exists() and path.read_text() != text:
            path.rename(path.with_name(f"{path.stem}.attempt-{self.attempt - 1}{path.suffix}"))
        write_durably(path, text.encode())

    def _try_to_write(
        self, state: str, step: int, samples: int, epoch: float, exit_code: int | None
    ) -> None:
        try:
            self._write(state, step, samples, epoch, exit_code)
        except OSError as error:
            log.warning("%s/status.json is out of date: %s", self.path, reason(error))

    def _write(
        self, state: str, step: int, samples: int, epoch: float, exit_code: int | None
    ) -> None:
        self._written_s = time.monotonic()
        status = Status(
            state=state,
            step=step,
            samples=samples,
            epoch=epoch,
            attempt=self.attempt,
            exit_code=exit_code,
            updated_s=time.time(),
            **this_process(),
        )
        write_durably(self.path / "status.json", status.to_json().encode())


@dataclass(frozen=True)
class Choice:
    """The folder a start uses."""

    folder: RunFolder
    resumes: bool
    """Whether it holds a checkpoint to continue from (not verified yet)."""
    note: str
    """One sentence for the person who started the run."""


def choose(name: str, out: Path | None, resume: str, base: Path = Path("runs")) -> Choice:
    """Choose and create the run folder. Local: rank 0 only, the caller broadcasts the result.

    Args:
        name: names a new folder `base/name-NNN` (next free number).
        out: `--out`.
        resume: "never": a new run. "auto": continues `out`, or without it the newest
            `base/name-NNN` that is not complete, not running, and has a checkpoint; else a new run.
            Otherwise a run folder to continue.
        base: where numbered folders are.

    Raises:
        UsageError: the folder does not fit `resume`, or the run in it is still running.
        WriteError: the folder cannot be created.
    """
    if resume not in ("auto", "never"):
        return _continue_named(Path(resume), out)
    if out is None:
        old = _newest_unfinished(name, base) if resume == "auto" else None
        if old is not None:
            return _opened(old, True, f"continues {old}")
        new = _create_numbered(name, base)
        why = f"; nothing unfinished to continue in {base}" if resume == "auto" else ""
        return Choice(RunFolder(new), False, f"new run {new}{why}")
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise cannot_write(out, error) from None
    if taken and not _is_run(out):
        raise UsageError(f"--out {out}: exists and is no run folder; give a new or empty one")
    if taken and resume == "never":
        raise UsageError(
            f"--out {out}: already holds a run; continue it with --resume auto, or give another "
            "folder (or remove this one)"
        )
    if taken and has_checkpoint(out):
        return _opened(out, True, f"continues {out}")
    _create(out)
    return _opened(out, False, f"new run {out}")


def has_checkpoint(path: Path) -> bool:
    """Whether a run folder holds a complete checkpoint, not verified. Local."""
    folders = manifest.checkpoints(path / "checkpoints")
    return any((folder / manifest.MANIFEST).exists() for folder in folders)


def log_path(path: Path, rank: int) -> Path:
    """Log file of one rank of the run at `path`. Local."""
    return path / "logs" / f"rank-{rank:05d}.log"


def cannot_write(path: Path, error: OSError) -> WriteError:
    """The error for a run folder that cannot be written. Local."""
    where = error.filename or path
    return WriteError(
        f"cannot write {where}: {reason(error)}. Free space, correct the permissions, or choose "
        "another place with --out DIR"
    )


def _is_run(path: Path) -> bool:
    # The log is the first file of a start; one killed right after it can be continued all the same.
    marks = (path / "status.json", path / "config.toml", log_path(path, 0))
    return any(mark.exists() for mark in marks)


def _continue_named(path: Path, out: Path | None) -> Choice:
    if out is not None and out.resolve() != path.resolve():
        raise UsageError(f"--resume {path} continues in that folder; leave --out {out} away")
    if not path.is_dir() or not has_checkpoint(path):
        raise UsageError(
            f"--resume {path}: not a run folder with a checkpoint; give the folder that holds "
            "config.toml and checkpoints/, or auto, or never"
        )
    return _opened(path, True, f"continues {path}")


def _opened(path: Path, resumes: bool, note: str) -> Choice:
    status = read_status(path)
    if status and is_running(status):
        raise UsageError(
            f"{path}: this run is still running (process {status.pid} on {status.host}); stop it "
            f"with `hpctrain stop {path}`, or give another folder with --out"
        )
    attempt = 1 + (status.attempt if status else 0)
    again = f", attempt {attempt}" if attempt > 1 else ""
    return Choice(RunFolder(path, attempt), resumes, note + again)


def _numbered(name: str, base: Path) -> list[tuple[int, Path]]:
    pattern = re.compile(re.escape(name) + r"-(\d{3,})")
    paths = base.iterdir() if base.is_dir() else ()
    matches = [(pattern.fullmatch(path.name), path) for path in paths]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _newest_unfinished(name: str, base: Path) -> Path | None:
    for _, path in _numbered(name, base):
        status = read_status(path)
        unfinished = not status or (status.state != "complete" and not is_running(status))
        if unfinished and has_checkpoint(path):
            return path
    return None


def _create_numbered(name: str, base: Path) -> Path:
    taken = _numbered(name, base)
    number = taken[0][0] + 1 if taken else 1
    while True:
        path = base / f"{name}-{number:03d}"
        try:
            base.mkdir(parents=True, exist_ok=True)
            os.mkdir(path)
        except FileExistsError:
            if not base.is_dir():
                raise UsageError(f"{base}: is not a folder; give a place with --out") from None
            number += 1  # another start took it between our look and now
        except OSError as error:
            raise cannot_write(path, error) from None
        else:
            return path


def _create(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
