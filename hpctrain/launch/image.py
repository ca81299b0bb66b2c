"""What a container image says of itself, and whether the launcher's MPI fits it.

The definition files under containers/ write these labels; nothing here loads MPI.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Literal

from hpctrain.errors import BackendError, UsageError

Family = Literal["openmpi", "mpich"]
TITLES: dict[Family, str] = {"openmpi": "Open MPI", "mpich": "MPICH"}

LABEL_MPI = "org.hpctrain.mpi"
"""Family of the MPI in the image: "openmpi" (libmpi.so.40) or "mpich" (libmpi.so.12)."""
LABEL_MPI_VERSION = "org.hpctrain.mpi.version"
LABEL_TORCH = "org.hpctrain.torch"
LABEL_HOROVOD = "org.hpctrain.horovod"
LABEL_CUDA = "org.hpctrain.cuda"
"""CUDA version that torch and Horovod were built for, "none" in a CPU image."""


ROWS = (
    ("hpctrain", "org.opencontainers.image.version"),
    ("MPI family", LABEL_MPI),
    ("MPI version", LABEL_MPI_VERSION),
    ("torch", LABEL_TORCH),
    ("Horovod", LABEL_HOROVOD),
    ("CUDA", LABEL_CUDA),
)
LAUNCHERS: dict[str, str] = {
    "openmpi": "mpirun of Open MPI, srun --mpi=pmix",
    "mpich": "mpiexec of MPICH, Intel MPI or PALS, srun --mpi=pmi2",
}


def inspect_words(image: Path, program: str = "apptainer") -> list[str]:
    """Words that print the labels of an image as JSON. Local, pure."""
    return [program, "inspect", "--labels", "--json", str(image)]


def describe(found: dict[str, str]) -> str:
    """A few lines for a person about an image's labels. Local, pure."""
    rows = [(title, found.get(name, "(no label)")) for title, name in ROWS]
    rows.append(("starts under", LAUNCHERS.get(found.get(LABEL_MPI, ""), "(unknown)")))
    return "\n".join(f"{title:<13} {value}" for title, value in rows)


def labels(image: Path, program: str = "apptainer") -> dict[str, str]:
    """Read the labels of an image. Local; runs `apptainer inspect`.

    Args:
        image: A SIF file or a sandbox folder.
        program: "apptainer" or "singularity", or a path of one.

    Raises:
        UsageError: there is no such image.
        BackendError: the program is missing, or it cannot read the image.
    """
    if not image.exists():
        raise UsageError(
            f"{image}: no such image. Build one (hpctrain container build OUT.sif), or give the "
            "path of a SIF file that is there."
        )
    command = inspect_words(image, program)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise BackendError(
            f"{program} cannot be started ({error.strerror}): load the site's module (module load "
            "apptainer, or singularity), or name the program (--program PATH)."
        ) from None
    if done.returncode != 0:
        raise BackendError(
            f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}. "
            "Is it a complete SIF file (apptainer sif list IMAGE)?"
        )
    return _labels_of(done.stdout)


def check_family(image: Path, family: Family, program: str = "apptainer") -> str | None:
    """Refuse an image whose MPI is not the launcher's. Local.

    Tried: MPICH's mpiexec with an Open MPI image starts N jobs of one rank and reports success;
    Open MPI's mpirun with an MPICH image ends in MPI_Init.

    Args:
        image: A SIF file or a sandbox folder.
        family: MPI family of the launcher on the host.
        program: "apptainer" or "singularity", or a path of one.

    Returns:
        A warning where the image does not say which MPI it holds, else None.

    Raises:
        BackendError: the image names the other family, or cannot be read.
        UsageError: there is no such image.
    """
    found = labels(image, program).get(LABEL_MPI)
    if found is None:
        return (
            f"{image} has no label {LABEL_MPI}, so nobody can tell whether its MPI fits the "
            f"launcher ({TITLES[family]}). hpctrain itself checks again when it starts."
        )
    if found != family:
        raise BackendError(
            f"{image} holds the MPI family {found!r} (label {LABEL_MPI}), the launcher is of "
            f"{TITLES[family]} ({family!r}). Together they start N jobs of one rank each, or end "
            "in MPI_Init, instead of one job of N ranks. What to do: take the image of the "
            "launcher's family "
            f"(hpctrain container build --mpi {family} OUT.sif), or start with a launcher of the "
            f"image's family ({'mpirun' if found == 'openmpi' else 'mpiexec'} of {found})."
        )
    return None


def _labels_of(text: str) -> dict[str, str]:
    """Labels out of `inspect --json`, whose nesting differs between versions."""
    try:
        found = json.loads(text)
        for key in ("data", "attributes", "labels"):
            found = found.get(key, found)
        return {str(name): str(value) for name, value in found.items()}
    except (ValueError, AttributeError):
        return {}
