"""Command lines of Apptainer and Singularity, as lists of words. Nothing is started but questions.

Environment variables of the host pass into the container as they are: the launcher's own
(OMPI_*, PMI*, PMIX_*, SLURM_*) must reach the ranks, so neither --cleanenv nor --contain is used.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpctrain.errors import BackendError

PROGRAMS = ("apptainer", "singularity")
SHARENS_SINCE = (1, 3)
"""Apptainer's first version with --sharens; Singularity has none."""


def exec_words(
    image: str,
    *,
    program: str = "apptainer",
    binds: Sequence[str] = (),
    flags: Sequence[str] = (),
    gpu: str | None = None,
    sharens: bool | None = None,
) -> list[str]:
    """Words that start a command inside an image; the command's own words follow. Local, pure.

    Args:
        image: Path of the image.
        program: "apptainer" or "singularity", or a path of one.
        binds: Folders to show inside, each SRC[:DST[:OPTS]].
        flags: More flags of `exec`, as they are.
        gpu: "--nv", "--rocm" or None, see `gpu_flag`.
        sharens: Let the ranks of a node share one user namespace, so that shared memory between
            them works. None: where the program is called apptainer; see `can_share`.
    """
    words = [program, "exec"]
    if Path(program).name == "apptainer" if sharens is None else sharens:
        words.append("--sharens")
    if gpu:
        words.append(gpu)
    for bind in binds:
        words += ["--bind", bind]
    return [*words, *flags, image]


def build_words(
    definition: str,
    image: str,
    *,
    program: str = "apptainer",
    arguments: Sequence[str] = (),
    argument_file: str | None = None,
    binds: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> list[str]:
    """Words that build an image; to be started in the folder of the checkout. Local, pure.

    Args:
        definition: Path of the definition file.
        image: Path of the image to make.
        program: "apptainer" or "singularity", or a path of one.
        arguments: Build arguments, each NAME=VALUE; they win over the file's.
        argument_file: A file of build arguments (containers/cuda.args).
        binds: Folders to show inside the build, each SRC[:DST[:OPTS]].
        flags: More flags of `build`, as they are.
    """
    words = [program, "build"]
    if argument_file:
        words += ["--build-arg-file", argument_file]
    for argument in arguments:
        words += ["--build-arg", argument]
    for bind in binds:
        words += ["--bind", bind]
    return [*words, *flags, image, definition]


def gpu_flag(devices: Path = Path("/dev")) -> str | None:
    """The flag that shows this machine's GPUs inside a container; None without GPUs. Local."""
    if (devices / "nvidiactl").exists():
        return "--nv"
    if (devices / "kfd").exists():
        return "--rocm"
    return None


def find_program(wanted: str | None = None) -> str:
    """The container program to use: `wanted`, else the first of `PROGRAMS` on PATH. Local.

    Raises:
        BackendError: there is none.
    """
    names = (wanted,) if wanted else PROGRAMS
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        raise BackendError(
            f"{' and '.join(names)} not found on PATH: load the site's module (module load "
            "apptainer, or singularity), or name the program with --program PATH. At some sites "
            "only compute nodes have it."
        )
    return found


def can_share(program: str) -> bool:
    """Whether this program knows --sharens. Local; runs `PROGRAM --version`.

    Raises:
        BackendError: the program does not start.
    """
    command = [program, "--version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BackendError(f"{program} cannot be started: {error.strerror}") from None
    found = re.match(r"apptainer version (\d+)\.(\d+)", done.stdout)
    return found is not None and (int(found[1]), int(found[2])) >= SHARENS_SINCE


def cache_settings(program: str, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that keep the program's own cache out of $HOME, unless somebody chose. Local.

    What programs inside the image cache (matplotlib, triton, ...) the image itself keeps out of
    $HOME.
    """
    env = os.environ if environ is None else environ
    name = f"{Path(program).name.upper()}_CACHEDIR"
    if env.get(name):
        return {}
    return {name: f"{env.get('TMPDIR') or '/var/tmp'}/{Path(program).name}-cache-{os.getuid()}"}
