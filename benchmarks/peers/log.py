"""The log of finished runs: one JSON line each, appended at once, never rewritten."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.peers.job import Job

Line = dict[str, Any]
KEYS = ("what", "task", "system", "lr", "seed", "ranks", "per_node", "rate", "fingerprint")


def key_of(what: str, job: Job, rate: str = "") -> Line:
    """What tells one run from another.

    Args:
        what: steps, shaped, full or final.
        job: the run.
        rate: of the links; "" on this host.
    """
    found = {"what": what, "rate": rate, "fingerprint": job.fingerprint()}
    return {name: found[name] if name in found else getattr(job, name) for name in KEYS}


class Log:
    """Several processes may append to one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self) -> list[Line]:
        """All finished runs, oldest first."""
        if not self._path.exists():
            return []
        lines = map(json.loads, self._path.read_text().splitlines())
        return [{"per_node": 1} | line for line in lines]  # which older lines do not have

    def find(self, key: Line) -> Line | None:
        """The newest run of this key."""
        found = [line for line in self.lines() if {name: line[name] for name in KEYS} == key]
        return found[-1] if found else None

    def append(self, line: Line) -> None:
        """Write one line in one piece."""
        data = (json.dumps(line) + "\n").encode()
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, data)
        finally:
            os.close(file)
