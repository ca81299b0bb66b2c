"""The run folder's file system: type, room, time of a durable write, and who sees the file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from hpctrain.doctor.facts import Space
from hpctrain.doctor.finding import Finding, size_text, some, time_text
from hpctrain.doctor.mounts import IN_MEMORY, space
from hpctrain.runs.durable import reason, write_durably
from hpctrain.transport.communicator import Communicator

_BIG_BYTES = 4 << 20
_SMALL_WRITES = 3
_MIN_FREE_BYTES = 1 << 30
_SLOW_WRITE_S = 1.0
_SEEN_WITHIN_S = 3.0
_OTHER = "--out FOLDER names another place, e.g. on the scratch file system"


@dataclass(frozen=True)
class Stored:
    """What rank 0 found where run folders go."""

    folder: str
    """The existing folder that was tried."""
    problem: str
    """Why nothing could be written, "" if it could."""
    type: str | None
    free_bytes: int
    small_s: float
    """Median time of writing 4 KiB, flushing it and renaming it."""
    big_s: float
    """The same for 4 MiB."""
    blind: tuple[str, ...]
    """Other nodes on which the file did not appear within 3 s."""
    n_nodes: int


def try_folder(wanted: Path, comm: Communicator | None) -> Stored | None:
    """Collective, local without a communicator. Write on rank 0, look for it on every node.

    Args:
        wanted: Where run folders go; if it does not exist, the nearest folder above it is tried.
        comm: All ranks.

    Returns:
        On rank 0 what was found; None elsewhere.
    """
    stored, path = None, None
    if comm is None or comm.rank == 0:
        stored, path = _write(wanted)
    if comm is None:
        _remove(path)
        return stored
    message = None if comm.rank else json.dumps(str(path) if path else "").encode()
    name = str(json.loads(comm.broadcast_bytes(message, root=0)))
    seen = True
    if name and comm.topology.local_rank(comm.rank) == 0:
        seen = _appears(Path(name))
    answers = comm.allgather_bytes(b"" if seen else b"blind")
    _remove(path)
    if stored is None:
        return None
    blind = [comm.topology.hosts[rank] for rank, answer in enumerate(answers) if answer]
    changed = {**asdict(stored), "blind": tuple(blind), "n_nodes": comm.topology.n_nodes}
    return Stored(**changed)


def check(stored: Stored) -> Iterator[Finding]:
    """Whether run folders can live there."""
    values = asdict(stored)
    if stored.problem:
        yield Finding("run_folder", "fault", f"{stored.folder}: {stored.problem}", _OTHER, values)
        return
    shared = ""
    if stored.n_nodes > 1 and not stored.blind:
        shared = f", seen by all {stored.n_nodes} nodes"
    text = (
        f"{stored.folder}: {stored.type or 'unknown type'}, {size_text(stored.free_bytes)} free"
        f"{shared}; write + fsync + rename: 4 KiB {time_text(stored.small_s)}, 4 MiB "
        f"{time_text(stored.big_s)}"
    )
    if stored.blind:
        yield Finding(
            "run_folder",
            "fault",
            f"{text}; not seen on {some(stored.blind)}",
            "runs need a folder that all nodes share; " + _OTHER,
            values,
        )
    elif stored.type in IN_MEMORY or stored.type == "overlay":
        what = "in memory" if stored.type in IN_MEMORY else "the container's own layer"
        fix = f"this is {what} and is lost with the node or container; " + _OTHER
        yield Finding("run_folder", "warning", text, fix, values)
    elif stored.free_bytes < _MIN_FREE_BYTES:
        yield Finding("run_folder", "warning", text, "make room; " + _OTHER, values)
    elif stored.big_s > _SLOW_WRITE_S:
        fix = "checkpoints take this long for every few MB: save more rarely; " + _OTHER
        yield Finding("run_folder", "warning", text, fix, values)
    else:
        yield Finding("run_folder", "ok", text, values=values)


def _write(wanted: Path) -> tuple[Stored, Path | None]:
    """Local. What writing there takes, and the file that was left for the others to see."""
    folder = wanted.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        where: Space | None = space(folder)
    except OSError:
        where = None
    type_, free = (where.type, where.free_bytes) if where else (None, 0)
    path = folder / f".hpctrain-doctor-{os.getpid()}"
    try:
        small_s = median(_timed_write(path, 4096) for _ in range(_SMALL_WRITES))
        big_s = _timed_write(path, _BIG_BYTES)
    except OSError as error:
        _remove(path)
        problem = f"cannot be written: {reason(error)}"
        return Stored(str(folder), problem, type_, free, 0.0, 0.0, (), 1), None
    return Stored(str(folder), "", type_, free, small_s, big_s, (), 1), path


def _timed_write(path: Path, n_bytes: int) -> float:
    data = b"\0" * n_bytes
    began_s = time.perf_counter()
    write_durably(path, data)
    return time.perf_counter() - began_s


def _appears(path: Path) -> bool:
    """Local. Whether the file is there in full; network file systems may show it late."""
    deadline_s = time.monotonic() + _SEEN_WITHIN_S
    while True:
        try:
            if path.stat().st_size == _BIG_BYTES:
                return True
            os.listdir(path.parent)  # makes NFS ask its server
        except OSError:
            pass
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)


def _remove(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)
