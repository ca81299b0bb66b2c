"""Picks what a rank computes on and what carries its gradients: device, threads, transport."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from hpctrain.errors import BackendError
from hpctrain.exchange.dense import Dense
from hpctrain.transport.communicator import Communicator, DenseReducer
from hpctrain.transport.threads import ThreadCommunicator, ThreadReducer
from hpctrain.transport.wire import WireDtype


def choose_device(wanted: Literal["auto", "cpu", "cuda"], comm: Communicator) -> torch.device:
    """Collective. The CPU, or this rank's own GPU; the same kind on all ranks.

    "auto" takes the GPUs wherever there are any: a node with too few of them is an error and not a
    reason to train on its processor.

    Raises:
        BackendError: a node has fewer GPUs than ranks, or only some nodes have GPUs.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    node = comm.node()
    n_gpus = torch.cuda.device_count()
    # The launcher or scheduler may show each rank its own GPU only.
    one_each = n_gpus == 1 and os.environ.get("CUDA_VISIBLE_DEVICES", "").isdigit()
    enough = one_each or n_gpus >= node.size
    nodes = np.array([n_gpus > 0, n_gpus == 0], dtype=np.int32)
    comm.allreduce(nodes, "max")
    some_have, some_lack = nodes.tolist()
    if wanted == "auto" and not some_have:
        return torch.device("cpu")
    if some_lack or not enough:
        raise BackendError(
            f'train.device = "{wanted}" needs a GPU for each of the {node.size} rank(s) on every '
            f"node; {comm.topology.hosts[comm.rank]} shows {n_gpus}. Start fewer ranks per node, "
            'ask the scheduler for more GPUs, or set train.device = "cpu"'
        )
    device = torch.device("cuda", 0 if one_each else node.rank)
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
    config: Dense,
    names: Sequence[str],
    comm: Communicator,
    device: torch.device,
    stall_check_s: float,
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
