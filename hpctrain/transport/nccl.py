"""Dense gradient sums by torch.distributed (NCCL between GPUs), with the rendezvous over MPI.

No torchrun: rank 0 opens a store on a free port of its host and broadcasts where it is.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined] # public, not in __all__

from hpctrain.errors import BackendError
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.verbs import timed
from hpctrain.transport.wire import TORCH_DTYPES, BucketOrder, WireDtype


class NcclReducer:
    """A `DenseReducer` over torch.distributed. Collective.

    Half precision is added by the backend itself, which rounds at every step of its ring.

    Args:
        comm: The ranks that take part; it carries the rendezvous only.
        names: One name per bucket, for messages.
        wire_dtype: "native", "float16" or "bfloat16": buckets are cast before and after.
        backend: "nccl" for CUDA buckets (one GPU per rank, chosen with torch.cuda.set_device
            before), "gloo" for CPU buckets.
        timeout_s: How long the rendezvous may take, and with NCCL a collective before it aborts.

    Raises:
        BackendError: the backend is not built in, the store cannot be reached, or torch.distributed
            runs already.
    """

    name = "nccl"

    def __init__(
        self,
        comm: Communicator,
        *,
        names: Sequence[str],
        wire_dtype: WireDtype = "native",
        backend: str = "nccl",
        timeout_s: float = 1800.0,
    ) -> None:
        if not dist.is_available() or not dist.is_backend_available(backend):
            raise BackendError(
                f'this torch has no "{backend}" backend; install a build for your GPUs, or set '
                'exchange.dense_backend = "mpi"'
            )
        if dist.is_initialized():
            raise BackendError(
                "torch.distributed is initialised already; hpctrain makes its own process group: "
                'leave init_process_group out, or set exchange.dense_backend = "mpi"'
            )
        self.algorithm = f"chosen by {backend} (torch.distributed)"
        self.current = -1
        self._comm = comm
        self._wire = TORCH_DTYPES.get(wire_dtype)
        self._order = BucketOrder(names)
        self._wires: dict[int, torch.Tensor] = {}
        self._started: list[tuple[dist.Work, torch.Tensor, torch.Tensor]] = []
        self._store = _rendezvous(comm, timeout_s)
        dist.init_process_group(
            backend,
            store=self._store,
            rank=comm.rank,
            world_size=comm.size,
            timeout=timedelta(seconds=timeout_s),
        )

    def start(self, index: int, bucket: torch.Tensor) -> None:
        self._order.check(index, bucket)
        wire = bucket
        if self._wire is not None and bucket.dtype != self._wire:
            wire = self._rounded(index, bucket, self._wire)
        work = dist.all_reduce(wire, op=dist.ReduceOp.SUM, async_op=True)
        assert work is not None
        self._started.append((work, bucket, wire))
        nbytes = wire.numel() * wire.element_size()
        intra, inter = self._comm.topology.ring_bytes(self._comm.rank, nbytes)
        self._comm.ledger.add(intra=intra, inter=inter, source="formula")

    def finish(self) -> None:
        with timed(self._comm.ledger):
            for index, (work, bucket, wire) in enumerate(self._started):
                self.current = index
                # NCCL: makes the current stream wait, not this thread.
                work.wait()
                if wire is not bucket:
                    bucket.copy_(wire)
        self.current = -1
        self._started.clear()
        self._order.restart()

    def close(self) -> None:
        # While an exception unwinds, buckets may be under way that will never complete.
        if not self._started and dist.is_initialized():
            self._comm.barrier()
            dist.destroy_process_group()

    def _rounded(self, index: int, bucket: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        wire = self._wires.get(index)
        if wire is None or wire.shape != bucket.shape or wire.device != bucket.device:
            wire = self._wires[index] = torch.empty_like(bucket, dtype=dtype)
        return wire.copy_(bucket)


def _rendezvous(comm: Communicator, timeout_s: float) -> TCPStore:
    """Collective. A store that rank 0 serves and all ranks can reach."""
    timeout = timedelta(seconds=timeout_s)
    host = "127.0.0.1" if comm.topology.n_nodes == 1 else socket.gethostname()
    store: TCPStore | None = None
    if comm.rank == 0:
        # Port 0: the system picks a free one; nobody has joined yet, so do not wait for them.
        store = TCPStore(
            host, 0, comm.size, is_master=True, timeout=timeout, wait_for_workers=False
        )
    address = f"{host} {store.port}".encode() if store is not None else None
    host, port = comm.broadcast_bytes(address, 0).decode().split()
    if store is not None:
        return store
    try:
        return TCPStore(host, int(port), comm.size, is_master=False, timeout=timeout)
    except (RuntimeError, OSError) as error:
        raise BackendError(
            f"rank {comm.rank} on {comm.topology.hosts[comm.rank]} cannot reach rank 0's store at "
            f"{host}:{port} ({error}); host names must resolve between nodes and TCP be allowed"
        ) from error
