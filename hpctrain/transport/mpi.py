"""MPI itself: `start()` starts it and returns the communicator of all ranks.

Importing this module loads the MPI library but does not start MPI, so that `start()` can tell Open
MPI before which all-reduce to run. Nothing else in hpctrain imports mpi4py.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from typing import TYPE_CHECKING

import mpi4py

from hpctrain.transport import algorithm
from hpctrain.transport.abort import AbortGuard
from hpctrain.transport.communicator import Ledger
from hpctrain.transport.launcher import check_launch, launch_from_environment
from hpctrain.transport.mpi_reducer import MpiReducer
from hpctrain.transport.topology import Topology

mpi4py.rc.initialize = False
from mpi4py import MPI  # noqa: E402 - the line above keeps this import from starting MPI

if TYPE_CHECKING:
    from hpctrain.transport.mpi_communicator import MpiCommunicator

__all__ = ["MPI", "MpiReducer", "facts", "guard", "start"]

_PATIENCE_S = 3.0
"""How long a rank that exits with an error waits for the others to exit too."""
_AFTER_INIT_S = 0.5
"""How long ranks of srun and Open MPI 5 keep silent after MPI_Init, see `start`."""


class _Started:
    """The one MPI of this process."""

    world: MpiCommunicator | None = None
    guard: AbortGuard | None = None
    allreduce: str = "unknown: MPI was started before hpctrain"
    launcher: str = ""


def start() -> MpiCommunicator:
    """Start MPI, once, and return the communicator of all ranks. Collective over all ranks.

    Chooses Open MPI's all-reduce algorithm, asks for MPI_THREAD_MULTIPLE, refuses a launcher of
    another MPI family, and installs the abort guard. A second call returns the same communicator.

    Raises:
        BackendError: the launcher started several processes of which MPI knows nothing.
    """
    if _Started.world is not None:
        return _Started.world
    launch = launch_from_environment()
    library = MPI.Get_library_version().strip("\0\n ")
    if not MPI.Is_initialized():
        files = algorithm.configuration_files(os.environ, algorithm.loaded_library())
        choice = algorithm.choose(library, os.environ, files)
        with algorithm.applied(choice):
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
        if launch.family in ("slurm", "pmix") and library.startswith("Open MPI v5"):
            # A rank that is still inside MPI_Init crashes when a message of a faster one arrives
            # (open-mpi/ompi issue 12495); ranks that srun started leave it at different times.
            time.sleep(_AFTER_INIT_S)
        atexit.register(_finalize)
        _Started.allreduce = choice.report
    check_launch(launch, MPI.COMM_WORLD.Get_size(), library)
    _Started.launcher = launch.title

    from hpctrain.transport.mpi_communicator import MpiCommunicator

    comm = MPI.COMM_WORLD.Dup()
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first = node.bcast(comm.Get_rank())
    node.Free()
    places = comm.allgather((first, socket.gethostname()))
    topology = Topology.from_labels([place[0] for place in places], [place[1] for place in places])
    world = MpiCommunicator(comm, topology, Ledger(), _Started.allreduce)
    leaving = comm.Dup()
    _Started.world = world
    _Started.guard = AbortGuard(
        label=f"rank {world.rank}/{world.size} {topology.hosts[world.rank]}",
        rank=world.rank,
        abort_all=_abort_all if launch.family != "none" else os._exit,
        all_leave=lambda: _all_leave(leaving),
    )
    _Started.guard.install()
    return world


def guard() -> AbortGuard:
    """The abort guard that `start()` installed. Local."""
    assert _Started.guard is not None, "mpi.start() comes first"
    return _Started.guard


def facts() -> dict[str, str]:
    """Library, thread level, launcher and all-reduce algorithm, for the run's record. Local."""
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    return {
        "mpi_library": MPI.Get_library_version().splitlines()[0].strip(" \0"),
        "mpi_standard": ".".join(map(str, MPI.Get_version())),
        "mpi_thread_level": levels[MPI.Query_thread()],
        "mpi4py": mpi4py.__version__,
        "launcher": _Started.launcher,
        "allreduce": _Started.allreduce,
    }


def _abort_all(code: int) -> None:
    MPI.COMM_WORLD.Abort(code)


def _all_leave(comm: MPI.Intracomm) -> bool:
    request = comm.Ibarrier()
    deadline_s = time.monotonic() + _PATIENCE_S
    while not request.Test():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def _finalize() -> None:
    if not MPI.Is_finalized():
        MPI.Finalize()
