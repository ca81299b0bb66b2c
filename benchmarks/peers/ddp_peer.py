"""PyTorch DistributedDataParallel over Gloo, dense or with its PowerSGD hook.

One bucket with PowerSGD: its chained collectives start in another order on each rank where there
are more, and Gloo then mixes them up.

Source: T. Vogels, S. P. Karimireddy, M. Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression
for Distributed Optimization", 2019, arXiv 1905.13727; the hook is torch's.
"""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.workload import Workload, arguments

START_AT = 10


def main() -> None:
    args = arguments(
        powersgd={"type": int, "default": 0, "help": "rank of the approximation; 0: dense"},
        address={"default": "127.0.0.1", "help": "of the first rank's node"},
        port={"type": int, "default": 29512},
    )
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    size = int(os.environ["OMPI_COMM_WORLD_SIZE"])
    where = f"tcp://{args.address}:{args.port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    work = Workload(args, rank, size)
    if args.powersgd:
        dist._DEFAULT_FIRST_BUCKET_BYTES = 1 << 30
        model = DistributedDataParallel(work.model, bucket_cap_mb=1024)
        state = powersgd.PowerSGDState(
            None, matrix_approximation_rank=args.powersgd, start_powerSGD_iter=START_AT
        )
        model.register_comm_hook(state, powersgd.powerSGD_hook)
    else:
        model = DistributedDataParallel(work.model)
    optimizer = work.optimizer()

    def total(numbers: Tensor) -> Tensor:
        dist.all_reduce(numbers)
        return numbers

    for inputs, targets in work.steps(optimizer, total):
        optimizer.zero_grad()
        work.loss(model(inputs), targets).backward()
        work.clip()
        optimizer.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
