"""Where a run writes: the folder that rank 0 chose, and the checkpoint to continue from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpctrain.runs import manifest
from hpctrain.runs.folder import RunFolder, choose
from hpctrain.runs.logs import logging_to
from hpctrain.transport.communicator import Communicator


@dataclass(frozen=True)
class Place:
    """The run folder of this start, and the checkpoint it continues from. Equal on all ranks."""

    folder: RunFolder
    note: str
    checkpoint: manifest.Found | None

    def to_bytes(self) -> bytes:
        """For the broadcast from rank 0. Local."""
        found = self.checkpoint
        content = {
            "folder": self.folder.to_bytes().decode(),
            "note": self.note,
            "checkpoint": found and [str(found.path), found.step, found.size],
            "refused": [[r.name, r.reason] for r in found.refused] if found else [],
        }
        return json.dumps(content).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Place:
        """The inverse of `to_bytes`. Local."""
        content = json.loads(payload)
        found = None
        if content["checkpoint"]:
            path, step, size = content["checkpoint"]
            refused = tuple(manifest.Refusal(*refusal) for refusal in content["refused"])
            found = manifest.Found(Path(path), step, size, refused)
        return cls(RunFolder.from_bytes(content["folder"].encode()), content["note"], found)


@contextmanager
def claimed(name: str, out: Path | None, resume: str, comm: Communicator) -> Iterator[Place]:
    """Collective. Rank 0 chooses run folder and newest good checkpoint; all open their logs.

    Leaving the block closes the log, and removes a folder in which no run began.

    Args:
        name: Names a new folder.
        out: `--out`.
        resume: `--resume`.
        comm: All ranks.

    Raises:
        UsageError: the folder does not fit --resume.
        WriteError: the folder cannot be written.
        DataError: it has checkpoints, and none of them is good.
    """
    payload = None
    if comm.rank == 0:
        choice = choose(name, out, resume)
        found = None
        if choice.resumes:
            manifest.clean(choice.folder.checkpoints)
            found = manifest.latest(choice.folder.checkpoints)
        payload = Place(choice.folder, choice.note, found).to_bytes()
    place = Place.from_bytes(comm.broadcast_bytes(payload, root=0))
    log_file, attempt = place.folder.log(comm.rank), place.folder.attempt
    try:
        with logging_to(log_file, rank=comm.rank, size=comm.size, attempt=attempt):
            yield place
    finally:
        if comm.rank == 0:
            _remove_unused(place.folder.path)


def agree_on(path: Path, comm: Communicator) -> manifest.Found:
    """Collective. The checkpoint that a person points at, as rank 0 finds and verifies it.

    Raises:
        UsageError: the path holds no checkpoint.
        DataError: what is there cannot be used.
    """
    payload = None
    if comm.rank == 0:
        found = manifest.named(path)
        payload = json.dumps([str(found.path), found.step, found.size]).encode()
    where, step, size = json.loads(comm.broadcast_bytes(payload, root=0))
    return manifest.Found(Path(where), step, size)


def run_of(path: Path) -> Path | None:
    """The run folder that a path is, or that a checkpoint is in; None where it has no config.toml.

    Local.
    """
    for folder in (path, *path.resolve().parents[:2]):
        if RunFolder(folder).config.is_file():
            return folder
    return None


def _remove_unused(path: Path) -> None:
    # A start that failed before its first file of substance leaves no empty run behind.
    if {entry.name for entry in path.iterdir()} <= {"logs"}:
        shutil.rmtree(path)
