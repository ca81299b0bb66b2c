"""Keeping a script and handing it to the scheduler. What is submitted is always a file that stays.

Nothing that is there is ever overwritten: a script that differs from the newest one in the job's
folder becomes the next number.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpctrain.errors import BackendError, WriteError
from hpctrain.launch import pbs, slurm
from hpctrain.launch.image import check_family
from hpctrain.launch.job import Job
from hpctrain.launch.site import Site

_RENDER = {"slurm": slurm.render, "pbs": pbs.render}
_TEST_LIMIT_S = 60.0
_COMMENT_AFTER_S = 3.0
"""The server writes its remark when the scheduler has looked at the job."""


def render(job: Job, site: Site) -> str:
    """The job script for the site's scheduler. Local, pure."""
    return _RENDER[site.scheduler](job, site)


def script_path(folder: str, number: int) -> str:
    """Path of the script of that number in a job's folder. Local, pure."""
    return f"{folder}/job-{number:03}.sh"


def keep(folder: str, text_for: Callable[[str], str]) -> Path:
    """Write the script, unless the newest one there is the same; its path. Local.

    Args:
        folder: Of the job's own files; made if need be.
        text_for: The script, given the path under which it is kept.

    Raises:
        WriteError: the folder cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        names = (path.stem.partition("-")[2] for path in Path(folder).glob("job-*.sh"))
        newest = max((int(name) for name in names if name.isdigit()), default=0)
        path = Path(script_path(folder, newest))
        if newest and path.read_bytes() == text_for(str(path)).encode():
            return path
        path = Path(script_path(folder, newest + 1))
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text_for(str(path)))
        return path
    except OSError as error:
        raise WriteError(
            f"cannot write {error.filename or folder}: {error.strerror}. Free space, correct the "
            "permissions, or submit from another folder"
        ) from None


def verdict(site: Site, text: str) -> str | None:
    """What the scheduler thinks of a script without taking it; None if nobody can be asked. Local.

    PBS has no such mode, and where there is no sbatch there is nobody to ask.

    Raises:
        BackendError: it refuses; with its words.
    """
    if site.scheduler != "slurm" or not shutil.which("sbatch"):
        return None
    done = _run(slurm.TEST, text)
    said = (done.stderr + done.stdout).strip()
    if done.returncode != 0:
        raise BackendError(f"sbatch --test-only ended with {done.returncode}: {said}")
    return said


def hand_over(site: Site, script: Path) -> str:
    """Submit a script; the job's id. Local.

    Args:
        site: Says which scheduler.
        script: The file.

    Raises:
        BackendError: the scheduler's command is missing or refuses, or PBS says that the job can
            never run (it is then deleted).
    """
    command = slurm.SUBMIT if site.scheduler == "slurm" else pbs.SUBMIT
    if not shutil.which(command[0]):
        raise BackendError(
            f"{command[0]} is not on PATH: submit on a login node of the cluster. The script is "
            f"written: {script}"
        )
    done = _run([*command, str(script)])
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()
        raise BackendError(f"{command[0]} ended with {done.returncode}: {said} (script: {script})")
    job_id = done.stdout.strip().partition(";")[0]
    if site.scheduler == "pbs":
        time.sleep(_COMMENT_AFTER_S)
        _heed_comment(job_id, script)
    return job_id


def check_image(job: Job, site: Site) -> str | None:
    """Refuse an image whose MPI is not the site's, where it can be looked at from here. Local.

    Returns:
        A remark: the image does not say, or it could not be looked at. None if it fits.

    Raises:
        BackendError: it holds the other family.
    """
    image = Path(job.container)
    if not image.exists() or not shutil.which(site.container):
        why = f"no {site.container} here" if image.exists() else "no such file here"
        return f"{job.container} is not checked: {why}. hpctrain checks its MPI when it starts."
    return check_family(image, site.mpi, site.container)


def _heed_comment(job_id: str, script: Path) -> None:
    done = _run(["qstat", "-f", "-F", "json", job_id])
    try:
        said = pbs.comment(done.stdout)
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # ended already, or a PBS without JSON: it was taken, and that counts
    if pbs.NEVER not in said:
        return
    deleted = _run(["qdel", job_id]).returncode == 0
    raise BackendError(
        f"PBS took the job ({job_id}) and says: {said}. Ask for what the site has (pbsnodes -a "
        "shows it): --nodes, --ranks-per-node x --cpus-per-rank, --gpus-per-node, --queue. "
        + ("The job is deleted" if deleted else f"Delete it: qdel {job_id}")
        + f"; the script is {script}"
    )


def _run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    # A job's own counter must not leak into a job that is submitted from inside of it.
    environment = {key: value for key, value in os.environ.items() if key != "HPCTRAIN_ATTEMPT"}
    try:
        return subprocess.run(
            command,
            input=text or "",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TEST_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise BackendError(f"{command[0]} did not answer within {_TEST_LIMIT_S:g} s") from None
    except OSError as error:
        raise BackendError(f"{command[0]} cannot be started: {error.strerror}") from None
