"""Memory that the ranks of one node share (MPI_Win_allocate_shared), with room checked before.

MPI takes this memory from /dev/shm, which containers often limit to 64 MB; without the check a
rank that touches a page too many dies of SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.errors import BackendError
from hpctrain.transport.mpi import MPI
from hpctrain.transport.verbs import timed

if TYPE_CHECKING:
    from hpctrain.transport.mpi_communicator import MpiCommunicator

_SHM = Path("/dev/shm")
_OPEN_MPI_FOLDER = "OMPI_MCA_osc_sm_backing_directory"
_SPARE_BYTES = 1 << 20
_PAGE_BYTES = 1 << 16


def backing_folders() -> list[Path]:
    """Where the MPI library may place shared memory, as far as it can be known. Local."""
    named = os.environ.get(_OPEN_MPI_FOLDER)
    return [_SHM, Path(named)] if named else [_SHM]


class MpiWindow:
    """A `SharedWindow`. Made by `MpiCommunicator.window`; collective.

    Args:
        owner: Whose ranks share the memory; all on one node.
        comm: The owner's MPI communicator.
        nbytes: This rank's slice.

    Raises:
        BackendError: several nodes, or too little room.
    """

    def __init__(self, owner: MpiCommunicator, comm: MPI.Intracomm, nbytes: int) -> None:
        if owner.topology.n_nodes > 1:
            raise BackendError(
                f"a shared window needs all ranks on one node; these are "
                f"{owner.topology.describe()}; use comm.node().window(...)"
            )
        self._owner, self._comm = owner, comm
        _check_room(comm, nbytes)
        self._window = MPI.Win.Allocate_shared(nbytes, 1, comm=comm)
        # One long passive epoch, in which MPI_Win_sync orders plain loads and stores.
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self.slices: Sequence[np.ndarray] = [self._slice(rank) for rank in range(owner.size)]

    def fence(self) -> None:
        with timed(self._owner.ledger):
            self._window.Sync()
            self._comm.Barrier()
            self._window.Sync()

    def close(self) -> None:
        self.slices = []
        self._window.Unlock_all()
        self._window.Free()

    def _slice(self, rank: int) -> np.ndarray:
        memory, _ = self._window.Shared_query(rank)
        return np.asarray(memory).view(np.uint8)


def _check_room(comm: MPI.Intracomm, nbytes: int) -> None:
    """Collective, so that all ranks raise or none."""
    needed = comm.allreduce(-(-nbytes // _PAGE_BYTES) * _PAGE_BYTES) + _SPARE_BYTES
    for folder in backing_folders():
        try:
            stats = os.statvfs(folder)
        except OSError:
            free = needed
        else:
            free = stats.f_bavail * stats.f_frsize
        free = comm.allreduce(free, MPI.MIN)
        if free < needed:
            raise BackendError(
                f"shared memory for the {comm.Get_size()} rank(s) of this node needs "
                f"{needed / 2**20:.0f} MiB and {folder} has {free / 2**20:.0f} MiB free; enlarge "
                f"it (docker run --shm-size, or remount), or use fewer ranks per node"
            )
