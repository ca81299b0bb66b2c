"""What env.json says: versions, hosts, topology, git state, processor, container, command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hpctrain
from hpctrain.runs.status import job_id
from hpctrain.transport.topology import Topology

_PACKAGES = ("torch", "numpy", "mpi4py", "horovod", "safetensors", "pydantic")
_CONTAINER = ("APPTAINER_CONTAINER", "APPTAINER_NAME", "SINGULARITY_CONTAINER")
_SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HPCTRAIN_DATA")
_GIT_WITHIN_S = 10.0


def collect(
    topology: Topology,
    facts: Mapping[str, Any],
    arguments: Sequence[str] = tuple(sys.argv),
    folder: Path | None = None,
) -> dict[str, Any]:
    """Content of env.json. Local, rank 0; what cannot be found out is null.

    Of the environment only a few harmless variables are kept: it may hold passwords.

    Args:
        topology: of the world communicator.
        facts: what only others know (MPI library, exchange algorithm, device), kept as given.
        arguments: the command line.
        folder: where to look for a git repository; the working directory.
    """
    return {
        "command": list(arguments),
        "working_directory": os.getcwd(),
        "versions": versions(),
        "ranks": topology.size,
        "nodes": topology.n_nodes,
        "hosts": list(topology.hosts),
        "node_of": list(topology.node_of),
        "topology": topology.describe(),
        "job_id": job_id(),
        "git": git_state(folder or Path.cwd()),
        "system": platform.platform(),
        "processor": processor(),
        "cores_of_rank_0": len(os.sched_getaffinity(0)),
        "cores_of_node": os.cpu_count(),
        "container": container(os.environ),
        "settings": {name: os.environ.get(name) for name in _SETTINGS},
        **facts,
    }


def versions() -> dict[str, str | None]:
    """hpctrain, Python and the packages that a run depends on; None: not installed. Local."""
    return {
        "hpctrain": hpctrain.__version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def container(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The variables by which Apptainer and Singularity name the image, None outside. Local."""
    return {name: environment[name] for name in _CONTAINER if name in environment} or None


def git_state(folder: Path) -> dict[str, Any] | None:
    """`{"commit": ..., "dirty": ...}` of the repository around `folder`, if there is one. Local."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None:
        return None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def processor() -> str | None:
    """Name of the processor, None where the system does not tell. Local."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_WITHIN_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
