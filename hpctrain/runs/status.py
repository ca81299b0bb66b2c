"""status.json: where a run stands, and whether its process is alive. No torch, no MPI."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Status:
    """Content of status.json."""

    state: str
    """running, stopped (early, on request; checkpoint good), complete, or failed."""
    step: int
    samples: int
    epoch: float
    attempt: int
    """How many times this run was started."""
    exit_code: int | None
    """None while running."""
    pid: int
    """Process of rank 0 on `host`."""
    pid_start: int | None
    """Its start in clock ticks since boot: tells it from a later process of the same number."""
    host: str
    job_id: str | None
    """SLURM_JOB_ID or PBS_JOBID."""
    updated_s: float
    """When this was written, in seconds since the epoch."""

    def to_json(self) -> str:
        """Local. With the time in words as well."""
        updated = datetime.fromtimestamp(self.updated_s, timezone.utc).isoformat(timespec="seconds")
        return json.dumps({**asdict(self), "updated": updated}, indent=1) + "\n"


def read_status(path: Path) -> Status | None:
    """Status of the run folder `path`, None if it has none that can be read. Local."""
    try:
        content = json.loads((path / "status.json").read_text())
        return Status(**{field.name: content[field.name] for field in fields(Status)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_running(status: Status) -> bool | None:
    """Whether the run's process is alive; None if that cannot be seen from this host. Local."""
    if status.state != "running":
        return False
    if status.host != socket.gethostname():
        return None
    if not Path("/proc/self/stat").exists():
        return None
    return status.pid != os.getpid() and _start_of(status.pid) == status.pid_start


def this_process() -> dict[str, Any]:
    """The fields of `Status` that name this process. Local."""
    return {
        "pid": os.getpid(),
        "pid_start": _start_of(os.getpid()),
        "host": socket.gethostname(),
        "job_id": job_id(),
    }


def job_id() -> str | None:
    """The scheduler's name of this job, None outside of one. Local."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBID")


def _start_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, ValueError, IndexError):
        return None
