"""A model wrapper that lets two trainers take turns, block by block, and times each block.

Both trainers get the same wrapped model, so both are measured at the same place: the start of a
forward pass. At the end of a block the rank tells the driver over a named pipe and waits for leave
to go on; the driver freezes the other job meanwhile (SIGSTOP), so its background threads cost
nothing.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from torch import Tensor, nn

from hpctrain.data.spec import Spec
from hpctrain.models.cnn import Cnn


class Gate(nn.Module):
    """Calls `inner`; every `block` training passes reports the block's seconds and waits."""

    def __init__(self, inner: nn.Module, block: int, folder: str, job: str) -> None:
        super().__init__()
        self.inner = inner
        self._block = block
        self._passes = 0
        self._began = 0.0
        rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
        self._base = os.path.join(folder, f"{job}.{rank}")

    def forward(self, inputs: Tensor) -> Tensor:
        """The inner model's output; a training pass may wait for the driver first."""
        if self.training:
            if self._passes % self._block == 0:
                self._turn()
            self._passes += 1
        return self.inner(inputs)

    def _turn(self) -> None:
        now = time.perf_counter()
        report = {
            "pid": os.getpid(),
            "passes": self._passes,
            "block_s": now - self._began,
            "at": time.time(),
        }
        with open(f"{self._base}.out", "w") as out:
            out.write(json.dumps(report) + "\n")
        with open(f"{self._base}.in") as leave:
            if leave.readline().strip() != "go":
                os._exit(0)
        self._began = time.perf_counter()


def gated_cnn(spec: Spec, *, block: int, folder: str, job: str, **cnn: Any) -> Gate:
    """hpctrain's CNN behind a gate; a `model.kind = "benchmarks.gate:gated_cnn"`."""
    return Gate(Cnn(kind="cnn", **cnn).build(spec), block, folder, job)
