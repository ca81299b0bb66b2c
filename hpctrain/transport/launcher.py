"""What the launcher says before MPI is loaded: rank, size, and whether it fits the MPI library.

Reads the environment only. The table below is the one place where launchers' variables are named.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hpctrain.errors import BackendError

Family = Literal["openmpi", "pals", "mpich", "pmix", "slurm", "none"]


@dataclass(frozen=True)
class _Variables:
    family: Family
    title: str
    rank: str
    size: str
    local_rank: str


_TABLE = (
    _Variables(
        "openmpi",
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    _Variables("pals", "PALS mpiexec (Cray)", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID"),
    _Variables("mpich", "MPICH's mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    # The step's size, not the job's: a batch script itself has SLURM_NTASKS but is one process.
    _Variables("slurm", "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    _Variables("pmix", "a PMIx launcher", "PMIX_RANK", "", ""),
)
_LOCAL_RANKS = ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID")
_BATCH = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "COBALT_JOBID", "JOB_ID")


@dataclass(frozen=True)
class Launch:
    """This process as its launcher sees it; one process of one where there is no launcher."""

    family: Family
    rank: int
    size: int | None
    """None: the launcher does not say (PMIx)."""
    local_rank: int | None
    under_batch: bool
    """Whether a batch scheduler started the job."""
    title: str = "no launcher"


def launch_from_environment(environ: Mapping[str, str] | None = None) -> Launch:
    """Read the launcher's variables. Local; never loads MPI."""
    env = os.environ if environ is None else environ
    under_batch = any(name in env for name in _BATCH)
    for row in _TABLE:
        rank, size = _number(env, row.rank), _number(env, row.size)
        if rank is None or (row.size and size is None):
            continue
        local_ranks = (_number(env, name) for name in (row.local_rank, *_LOCAL_RANKS))
        local_rank = next((found for found in local_ranks if found is not None), None)
        return Launch(row.family, rank, size, local_rank, under_batch, row.title)
    return Launch("none", 0, 1, 0, under_batch)


def check_launch(launch: Launch, mpi_size: int, library: str) -> None:
    """Refuse N single-rank jobs where one job of N ranks was meant. Local.

    Without this check N trainers would each believe to be rank 0 and overwrite one run folder.

    Args:
        launch: What the launcher says.
        mpi_size: What MPI says.
        library: The MPI library's own version text.

    Raises:
        BackendError: the launcher started several processes and MPI sees one.
    """
    if mpi_size != 1 or launch.size is None or launch.size == 1:
        return
    raise BackendError(
        f"{launch.title} started {launch.size} processes, but the MPI library of this Python sees "
        f"1 rank, so each process would train alone (this is launcher rank {launch.rank} on "
        f"{socket.gethostname()}). Launcher and library belong to different MPI families, or the "
        f"launcher's variables do not reach into the container. Library: {library.strip()}. "
        f"What to do: {_remedy(launch.family)} In a container pass the launcher's variables "
        "through (no --cleanenv, no --containall)."
    )


def _remedy(family: Family) -> str:
    if family == "openmpi":
        return (
            "use an mpi4py that loads Open MPI (libmpi.so.40), or start with the mpiexec of the "
            "library named above."
        )
    if family in ("mpich", "pals"):
        return (
            "use an mpi4py that loads an MPICH-family library (libmpi.so.12: MPICH, Intel MPI, "
            "Cray MPICH), or start with the mpirun of the library named above."
        )
    return (
        "choose the process manager that the library supports (srun --mpi=list shows what there "
        "is; Open MPI: --mpi=pmix, MPICH: --mpi=pmi2), or start with mpirun."
    )


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    return int(text) if text.isdigit() else None
