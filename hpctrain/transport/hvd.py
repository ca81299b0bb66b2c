"""Dense gradient sums by Horovod, one bucket a tensor, Horovod's own fusion off.

Horovod's background thread agrees over ranks which buckets are ready and calls MPI_Allreduce, on
its own duplicate of the world communicator: the algorithm that `mpi.start()` chose runs here too.
With fusion, equal inputs gave several bit patterns at 3 ranks (architecture.md rule 3).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Sequence
from types import ModuleType

import torch

from hpctrain.errors import BackendError
from hpctrain.transport.algorithm import loaded_library
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.mpi_reducer import MpiReducer
from hpctrain.transport.verbs import timed
from hpctrain.transport.wire import BucketOrder, WireDtype

_FUSION = "HOROVOD_FUSION_THRESHOLD"


class HorovodReducer:
    """A `DenseReducer` over Horovod; Horovod is loaded and started here, not before. Collective.

    With wire_dtype = "bfloat16", which Horovod lacks, buckets travel as bytes over MPI and Horovod
    is not started.

    Args:
        comm: All ranks that the launcher started (Horovod knows no other group).
        names: One name per bucket; Horovod's stall messages show them.
        wire_dtype: "native", "float16" (rounded before the sum; Horovod adds in float32 and rounds
            at each step of the ring) or "bfloat16".
        stall_check_s: Horovod warns after so many seconds of waiting for a rank; None: never.
        stall_abort_s: Horovod gives up after so many seconds; None: never.

    Raises:
        BackendError: Horovod is not installed, does not fit, or `comm` is not the whole world.
    """

    name = "horovod"

    def __init__(
        self,
        comm: Communicator,
        *,
        names: Sequence[str],
        wire_dtype: WireDtype = "native",
        stall_check_s: float | None = 60.0,
        stall_abort_s: float | None = None,
    ) -> None:
        self._bytes: MpiReducer | None = None
        self._current = -1
        if wire_dtype == "bfloat16":
            self._bytes = MpiReducer(comm, names=names, wire_dtype=wire_dtype)
            self.algorithm = f"{self._bytes.algorithm} (by mpi4py: Horovod has no bfloat16)"
            return
        self._comm = comm
        self._half = wire_dtype == "float16"
        self._order = BucketOrder(names)
        self._wires: dict[int, torch.Tensor] = {}
        self._started: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        fusion = os.environ.setdefault(_FUSION, "0")
        kept = "" if fusion == "0" else f", {_FUSION}={fusion} kept: sums may differ between runs"
        self.algorithm = comm.algorithm + kept
        os.environ["HOROVOD_STALL_CHECK_DISABLE"] = "1" if stall_check_s is None else "0"
        if stall_check_s is not None:
            os.environ["HOROVOD_STALL_CHECK_TIME_SECONDS"] = str(max(1, round(stall_check_s)))
        os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = str(round(stall_abort_s or 0))
        self._hvd = _load()
        self._hvd.init()
        if (self._hvd.rank(), self._hvd.size()) != (comm.rank, comm.size):
            raise BackendError(
                f"Horovod sees rank {self._hvd.rank()} of {self._hvd.size()}, this exchange is "
                f"among {comm.size} rank(s) of which this is {comm.rank}; Horovod sums over all "
                'ranks of the launch only: use exchange.dense_backend = "mpi" for a smaller scope'
            )

    @property
    def current(self) -> int:
        """The bucket that is being waited for, -1 when none."""
        return self._current if self._bytes is None else self._bytes.current

    def start(self, index: int, bucket: torch.Tensor) -> None:
        if self._bytes is not None:
            self._bytes.start(index, bucket)
            return
        self._order.check(index, bucket)
        wire = self._rounded(index, bucket) if self._half else bucket
        handle = self._hvd.allreduce_async_(
            wire, name=f"{index}:{self._order.names[index]}", op=self._hvd.Sum
        )
        self._started.append((handle, bucket, wire))
        nbytes = wire.numel() * wire.element_size()
        intra, inter = self._comm.topology.ring_bytes(self._comm.rank, nbytes)
        self._comm.ledger.add(intra=intra, inter=inter, source="formula")

    def finish(self) -> None:
        if self._bytes is not None:
            self._bytes.finish()
            return
        with timed(self._comm.ledger):
            for index, (handle, bucket, wire) in enumerate(self._started):
                self._current = index
                self._hvd.synchronize(handle)
                if wire is not bucket:
                    bucket.copy_(wire)
        self._current = -1
        self._started.clear()
        self._order.restart()

    def close(self) -> None:
        if self._bytes is not None:
            self._bytes.close()
        elif not self._started:
            self._hvd.shutdown()

    def _rounded(self, index: int, bucket: torch.Tensor) -> torch.Tensor:
        wire = self._wires.get(index)
        if wire is None or wire.shape != bucket.shape or wire.device != bucket.device:
            wire = self._wires[index] = torch.empty_like(bucket, dtype=torch.float16)
        return wire.copy_(bucket)


def features() -> dict[str, str | bool | list[str] | None]:
    """What the installed Horovod was built with. Local; loads Horovod and does not start it.

    `dtypes` are the tensor types of its all-reduce, `mpi_library` the libmpi that it brought into
    this process.

    Raises:
        BackendError: it cannot be loaded, or was built without MPI.
    """
    hvd = _load()
    names = dir(hvd.mpi_ops.mpi_lib)
    found = (re.fullmatch(r"horovod_torch_allreduce_async_torch_(\w+)Tensor", n) for n in names)
    library = loaded_library()
    return {
        "version": importlib.metadata.version("horovod"),
        "mpi": bool(hvd.mpi_built()),
        "nccl": bool(hvd.nccl_built()),
        "gloo": bool(hvd.gloo_built()),
        "dtypes": sorted(match[1].lower() for match in found if match and "_" not in match[1]),
        "mpi_library": None if library is None else str(library),
    }


def _load() -> ModuleType:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise BackendError(
            f"Horovod cannot be loaded ({error}); build it for this Python, torch and MPI with "
            '`make horovod`, or set exchange.dense_backend = "mpi", which needs no build'
        ) from error
    if not hvd.mpi_built():
        raise BackendError(
            "this Horovod was built without MPI; build one with `make horovod`, or set "
            'exchange.dense_backend = "mpi"'
        )
    module: ModuleType = hvd
    return module
