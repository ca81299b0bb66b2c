"""Plain Horovod: `hvd.DistributedOptimizer` around torch's SGD, as its users write it.

With one rank it computes the whole batch: the arithmetic of a dense float32 sum, up to rounding.
"""

from __future__ import annotations

import horovod.torch as hvd
from torch import Tensor

from benchmarks.peers.workload import Workload, arguments


def main() -> None:
    compressions = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}
    args = arguments(compression={"choices": list(compressions), "default": "none"})
    hvd.init()
    work = Workload(args, hvd.rank(), hvd.size())
    model = work.model
    optimizer = hvd.DistributedOptimizer(
        work.optimizer(),
        named_parameters=model.named_parameters(),
        compression=compressions[args.compression],
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    def total(numbers: Tensor) -> Tensor:
        summed: Tensor = hvd.allreduce(numbers, op=hvd.Sum, name="evaluation")
        return summed

    for inputs, targets in work.steps(optimizer, total):
        optimizer.zero_grad()
        work.loss(model(inputs), targets).backward()
        if not work.clips:
            optimizer.step()
            continue
        optimizer.synchronize()
        work.clip()
        with optimizer.skip_synchronize():
            optimizer.step()


if __name__ == "__main__":
    main()
