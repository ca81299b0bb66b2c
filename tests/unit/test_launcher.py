from __future__ import annotations

import pytest

from hpctrain.errors import BackendError
from hpctrain.transport.launcher import Launch, check_launch, launch_from_environment

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
STEP = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "0"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("none", 0, 1, 0, False)),
        (OPEN_MPI, ("openmpi", 3, 4, 1, False)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, ("mpich", 1, 2, 1, False)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ("mpich", 1, 2, None, False)),
        (
            {"PALS_RANKID": "5", "PMI_RANK": "5", "PMI_SIZE": "6", "PALS_LOCAL_RANKID": "2"},
            ("pals", 5, 6, 2, False),
        ),
        (STEP, ("slurm", 2, 8, 0, False)),
        (BATCH_SCRIPT, ("none", 0, 1, 0, True)),
        # mpirun inside a batch job, with srun's variables of the batch step around it
        (OPEN_MPI | STEP | BATCH_SCRIPT, ("openmpi", 3, 4, 1, True)),
        ({"PMIX_RANK": "1"}, ("pmix", 1, None, None, False)),
        (OPEN_MPI | {"PBS_JOBID": "1.pbs"}, ("openmpi", 3, 4, 1, True)),
    ],
)
def test_launchers(environ: dict[str, str], expected: tuple[object, ...]) -> None:
    launch = launch_from_environment(environ)
    found = (launch.family, launch.rank, launch.size, launch.local_rank, launch.under_batch)
    assert found == expected


def test_a_foreign_launcher_is_refused() -> None:
    for environ, remedy in ((OPEN_MPI, "libmpi.so.40"), (STEP, "--mpi=pmix")):
        launch = launch_from_environment(environ)
        with pytest.raises(BackendError, match="each process would train alone") as caught:
            check_launch(launch, 1, "Some MPI 1.2\n")
        message = str(caught.value)
        assert remedy in message
        assert "Some MPI 1.2" in message
        assert f"started {launch.size} processes" in message


@pytest.mark.parametrize(
    ("size", "mpi_size"), [(1, 1), (4, 4), (None, 1), (4, 2)], ids=lambda value: str(value)
)
def test_fitting_launches_pass(size: int | None, mpi_size: int) -> None:
    check_launch(Launch("openmpi", 0, size, 0, False), mpi_size, "any")
