"""The fake PBS's commands: `python -m pbs_fake.commands qsub ...`, started by programs on PATH."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from pbs_fake.request import UNKNOWN_JOB, USAGE, Refused, parse
from pbs_fake.server import Pbs

UNAUTHORIZED = 159  # PBSE_PERM, 15007; measured
FINISHED = 35


def qsub(pbs: Pbs, words: list[str]) -> None:
    """qsub [options] [SCRIPT]; without one it reads its input."""
    path = words[-1] if words and not words[-1].startswith("-") and _is_file(words) else None
    script = Path(path).read_text() if path else sys.stdin.read()
    environment = {name: value for name, value in os.environ.items() if name != "PBS_FAKE"}
    environment["PWD"] = os.getcwd()
    request = parse(script, words[:-1] if path else words, environment)
    if path and request.name == "STDIN":
        request.name = Path(path).name
    print(pbs.submit(request, script, environment))


def qstat(pbs: Pbs, words: list[str]) -> None:
    """qstat -f [-x] -F json ID."""
    history = "-x" in words
    job_id = pbs.full(words[-1])
    job = _job(pbs, job_id, "qstat")
    if job["state"] == "F" and not history:
        raise Refused(
            f"qstat: {job_id} Job has finished, use -x or -H to obtain historical job information",
            FINISHED,
        )
    shown = {"Job_Name": job["request"]["name"], "job_state": job["state"]}
    shown |= {name: job[name] for name in ("comment", "run_count") if job[name]}
    if job["Exit_status"] is not None:
        shown["Exit_status"] = job["Exit_status"]
    print(json.dumps({"pbs_server": "pbslab", "Jobs": {job_id: shown}}))


def qdel(pbs: Pbs, words: list[str]) -> None:
    """qdel ID."""
    _job(pbs, words[-1], "qdel")
    pbs.delete(words[-1])


def qsig(pbs: Pbs, words: list[str]) -> None:
    """qsig -s SIGNAL ID."""
    if len(words) != 3 or words[0] != "-s":
        raise Refused("usage: qsig [-s signal] job_identifier...", USAGE)
    _job(pbs, words[2], "qsig")
    pbs.tell(words[2], signal.Signals[f"SIG{words[1].removeprefix('SIG')}"])


def qrerun(pbs: Pbs, words: list[str]) -> None:
    """qrerun ID: for operators only."""
    _job(pbs, words[-1], "qrerun")
    raise Refused(f"qrerun: Unauthorized Request  {words[-1]}", UNAUTHORIZED)


def _is_file(words: list[str]) -> bool:
    # The last word belongs to an option where the one before it is an option that takes a value.
    return len(words) < 2 or not (words[-2].startswith("-") and len(words[-2]) == 2)


def _job(pbs: Pbs, job_id: str, command: str) -> dict:
    try:
        return pbs.job(job_id)
    except KeyError:
        raise Refused(f"{command}: Unknown Job Id {job_id}", UNKNOWN_JOB) from None


if __name__ == "__main__":
    command = {"qsub": qsub, "qstat": qstat, "qdel": qdel, "qsig": qsig, "qrerun": qrerun}
    try:
        command[sys.argv[1]](Pbs(Path(os.environ["PBS_FAKE"])), sys.argv[2:])
    except Refused as refused:
        print(refused, file=sys.stderr)
        sys.exit(refused.code)
