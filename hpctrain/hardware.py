"""Picks what a rank computes on and what carries its gradients: device, threads, transport."""

from __future__ import annotations

import os

import torch

from hpctrain.errors import BackendError
from hpctrain.exchange.dense import Dense
from hpctrain.transport.communicator import Communicator, DenseReducer
from hpctrain.transport.threads import ThreadCommunicator, ThreadReducer
from hpctrain.transport.wire import WireDtype


def choose_device(wanted: str, comm: Communicator) -> torch.device:
    """Collective over the node. The CPU, or this rank's own GPU.

    Raises:
        BackendError: cuda was asked for and the node has fewer GPUs than ranks.
    """
    node = comm.node()
    n_gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    visible_one = n_gpus == 1 and os.environ.get("CUDA_VISIBLE_DEVICES", "").isdigit()
    enough = n_gpus >= node.size or visible_one
    if wanted == "cuda" and not enough:
        raise BackendError(
            f'train.device = "cuda" needs a GPU for each of the {node.size} rank(s) on '
            f"{comm.topology.hosts[comm.rank]}, which shows {n_gpus}; start fewer ranks per node, "
            'ask the scheduler for more GPUs, or set train.device = "cpu"'
        )
    if wanted == "cpu" or not enough or n_gpus == 0:
        return torch.device("cpu")
    device = torch.device("cuda", 0 if visible_one else node.rank)
    torch.cuda.set_device(device)
    return device


def choose_threads(configured: int | None, comm: Communicator) -> int:
    """Collective over the node. Torch threads of this rank, set and returned.

    Without a setting: OMP_NUM_THREADS, else the cores this rank may use, shared with the ranks on
    the node where the launcher did not bind them apart.
    """
    node = comm.node()
    cores = len(os.sched_getaffinity(0))
    if configured is None and "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    bound_apart = cores * node.size <= (os.cpu_count() or cores)
    threads = configured or max(1, cores if bound_apart else cores // node.size)
    torch.set_num_threads(threads)
    return threads


def make_reducer(
    config: Dense, names: list[str], comm: Communicator, device: torch.device, stall_check_s: float
) -> DenseReducer | None:
    """Collective. The configured transport of dense sums; None where there is one rank.

    Args:
        config: Backend and number format.
        names: One name per bucket.
        comm: The ranks that take part.
        device: Where the gradients live.
        stall_check_s: After so long Horovod's own stall check speaks.

    Raises:
        BackendError: the backend is not available here.
    """
    if comm.size == 1:
        return None
    wire: WireDtype = "native" if config.wire_dtype == "float32" else config.wire_dtype
    if isinstance(comm, ThreadCommunicator):
        return ThreadReducer(comm, names=names, wire_dtype=wire)
    if config.dense_backend == "nccl":
        if device.type != "cuda":
            raise BackendError(
                'exchange.dense_backend = "nccl" moves GPU memory and this run is on the CPU; use '
                '"horovod" or "mpi"'
            )
        from hpctrain.transport.nccl import NcclReducer

        return NcclReducer(comm, names=names, wire_dtype=wire)
    if config.dense_backend == "horovod":
        from hpctrain.transport.hvd import HorovodReducer

        return HorovodReducer(comm, names=names, wire_dtype=wire, stall_check_s=stall_check_s)
    from hpctrain.transport.mpi_reducer import MpiReducer

    return MpiReducer(comm, names=names, wire_dtype=wire)
