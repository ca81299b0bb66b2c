"""Loads torch, Horovod and the MPI library in a process of its own, so that a crash is a finding.

`python -m hpctrain.doctor.probe torch horovod` prints one line of JSON per stage. Nothing is
started: no MPI_Init, which login nodes refuse, and no hvd.init.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpctrain.doctor.facts import Probe
from hpctrain.errors import BackendError

_LIMIT_S = 60.0
_TAIL = 300


def probe(stages: Sequence[str]) -> Probe:
    """Load each of `stages` ("torch", "horovod", "mpi") in one child process. Local.

    Call it before MPI is started: some fabrics do not survive a fork afterwards.
    """
    command = [sys.executable, "-m", "hpctrain.doctor.probe", *stages]
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), package)))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
        output, code, errors = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        code, errors = None, ""
    except OSError as error:
        return Probe(problems={stage: str(error) for stage in stages})
    return read(stages, output, code, errors)


def read(stages: Sequence[str], output: str, code: int | None, errors: str) -> Probe:
    """What a probe's output says; a stage without a line is the one it died in. Local.

    Args:
        stages: As asked for.
        output: Its standard output.
        code: Its exit code, negative for a signal, None if it was not done in time.
        errors: Its standard error.
    """
    found: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for line in output.splitlines():
        try:
            answer = json.loads(line)
            stage, content, problem = answer["stage"], answer["found"], answer["problem"]
        except (ValueError, KeyError, TypeError):
            continue  # libraries print what they like
        if problem is None:
            found[stage] = content
        else:
            problems[stage] = problem
    silent = [stage for stage in stages if stage not in found and stage not in problems]
    for stage in silent[:1]:
        if code is None:
            problems[stage] = f"loading it took more than {_LIMIT_S:.0f} s"
        elif code < 0:
            problems[stage] = f"loading it ended the process by signal {-code}"
        else:
            problems[stage] = f"loading it ended the process: {errors.strip()[-_TAIL:]}"
    for stage in silent[1:]:
        problems[stage] = f"not tried, as {silent[0]} failed"
    return Probe(**found, problems=problems)


def _torch() -> dict[str, str | bool | None]:
    import torch
    import torch.distributed as dist

    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "nccl": bool(dist.is_available() and dist.is_nccl_available()),
    }


def _horovod() -> dict[str, Any]:
    from hpctrain.transport.hvd import features

    return features()


def _mpi() -> dict[str, str | None]:
    from hpctrain.transport.algorithm import loaded_library
    from hpctrain.transport.mpi import MPI

    path = loaded_library()
    return {
        "library": MPI.Get_library_version().splitlines()[0].strip(" \0"),
        "mpi4py": importlib.metadata.version("mpi4py"),
        "loaded": None if path is None else str(path),
    }


def _main(stages: Sequence[str]) -> None:
    known = {"torch": _torch, "horovod": _horovod, "mpi": _mpi}
    for stage in stages:
        content, problem = None, None
        try:
            content = known[stage]()
        except (ImportError, OSError, RuntimeError, AttributeError, BackendError) as error:
            problem = f"{type(error).__name__}: {error}"[:_TAIL]
        print(json.dumps({"stage": stage, "found": content, "problem": problem}), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
