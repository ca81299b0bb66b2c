"""The batch job around this process and how long it still lasts; SLURM and PBS are asked once."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from hpctrain.doctor.facts import Allocation, Facts
from hpctrain.doctor.finding import Finding, time_text
from hpctrain.table import parse_duration_s

_LIMIT_S = 5.0
_SOON_S = 600.0
_UNLIMITED = ("UNLIMITED", "NOT_SET", "INVALID")

Ask = Callable[[Sequence[str]], str | None]
"""Runs a command; its output, None if it is missing, fails or takes too long."""


def ask(command: Sequence[str]) -> str | None:
    """Run a scheduler's command, at most 5 s. Local."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def find(environment: Mapping[str, str], ask: Ask = ask) -> Allocation | None:
    """The job by SLURM's or PBS's variables, None outside of a job. Local; rank 0 calls it.

    Args:
        environment: The variables.
        ask: Runs squeue and qstat.
    """
    if job := environment.get("SLURM_JOB_ID"):
        left, source = _slurm_left(job, environment, ask)
        nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or ""
        count = int(nodes) if nodes.isdigit() else None
        return Allocation(scheduler="SLURM", job=job, nodes=count, seconds_left=left, source=source)
    if job := environment.get("PBS_JOBID"):
        left, source = _pbs_left(job, ask)
        count = _nodes_in(environment.get("PBS_NODEFILE", ""))
        return Allocation(scheduler="PBS", job=job, nodes=count, seconds_left=left, source=source)
    return None


def check(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Whether there is time left in the allocation, and whether all its nodes are used."""
    allocation = ranks[0].allocation
    if allocation is None:
        return
    title = f"{allocation.scheduler} job {allocation.job}"
    left = allocation.seconds_left
    values = allocation.model_dump()
    if left is None:
        yield Finding(
            "time_left",
            "note",
            f"{title}: the time left is unknown ({allocation.source})",
            "give the run its limit: --walltime 4h",
            values,
        )
    elif left < _SOON_S:
        text = f"{title} ends in {time_text(max(left, 0))} ({allocation.source})"
        yield Finding("time_left", "warning", text, "start a longer job", values)
    else:
        text = f"{title}: {time_text(left)} left ({allocation.source})"
        yield Finding("time_left", "ok", text, values=values)


def _slurm_left(job: str, environment: Mapping[str, str], ask: Ask) -> tuple[float | None, str]:
    end = environment.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        return int(end) - time.time(), "SLURM_JOB_END_TIME"
    answer = ask(("squeue", "-h", "-j", job, "-o", "%L"))
    if answer is None or not answer.strip():
        return None, "no SLURM_JOB_END_TIME, and squeue does not answer here"
    text = answer.split()[0]
    if text in _UNLIMITED:
        return None, f"squeue says {text}"
    # squeue writes "9:05" for minutes and seconds.
    minutes = re.fullmatch(r"(\d+):(\d{2})", text)
    padded = f"0:{minutes[1]:0>2}:{minutes[2]}" if minutes else text
    try:
        return float(str(parse_duration_s(padded))), "squeue"
    except ValueError:
        return None, f'squeue says "{text}"'


def _pbs_left(job: str, ask: Ask) -> tuple[float | None, str]:
    answer = ask(("qstat", "-f", "-F", "json", job))
    if answer is None:
        return None, "qstat does not answer here"
    try:
        content = next(iter(json.loads(answer)["Jobs"].values()))
        limit = parse_duration_s(content["Resource_List"]["walltime"])
        used = parse_duration_s(content.get("resources_used", {}).get("walltime", "0"))
        return float(str(limit)) - float(str(used)), "qstat"
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None, "qstat does not tell a walltime"


def _nodes_in(path: str) -> int | None:
    try:
        with open(path, encoding="utf-8") as file:
            return len({line.strip() for line in file} - {""})
    except OSError:
        return None
