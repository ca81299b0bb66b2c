"""What all peers share: the model, data, sample order and lr of an hpctrain configuration.

Only the exchange is a peer's own. `steps` yields each step's share of the batch, evaluates between
steps, and stops when the target was held twice in a row or an evaluation is not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.target import Target
from hpctrain.config import load
from hpctrain.data.loader import Loader
from hpctrain.data.order import SampleOrder
from hpctrain.models.loss import per_sample_loss
from hpctrain.optimiser import Sgd
from hpctrain.randomness import RandomState
from hpctrain.transport.threads import run_threads


def arguments(**more: dict[str, Any]) -> argparse.Namespace:
    """The command line of a peer; `more` are options of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", help="a TOML file of hpctrain; its [exchange] is not read")
    parser.add_argument("--out", type=Path, required=True, help="what rank 0 writes at the end")
    parser.add_argument("--target", type=Target.parse, default=None)
    parser.add_argument("--evaluate-from", type=int, default=0, help="first step to evaluate at")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()


def link_bytes() -> int:
    """Bytes sent over eth0 of this network namespace; 0 where there is none."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.strip().partition(":")
        if name == "eth0":
            return int(numbers.split()[8])
    return 0


class Workload:
    """One rank's training, without the exchange."""

    def __init__(self, args: argparse.Namespace, rank: int, size: int) -> None:
        self.run = load(args.config).run
        self._args, self._rank, self._size = args, rank, size
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self._data = run_threads(1, lambda comm: self.run.data.load(comm, self.run.seed))[0]
        RandomState(self.run.seed, rank).seed_model()
        self.model = self.run.model.build(self._data.spec)
        self._curve: list[list[float]] = []
        self._curve_s: list[float] = []
        self._step_s: list[float] = []
        self._bytes: list[int] = []

    def optimizer(self) -> torch.optim.SGD:
        """torch's own, with the run's settings."""
        config = self.run.optimiser
        assert isinstance(config, Sgd)
        return torch.optim.SGD(
            self.model.parameters(),
            lr=self.run.lr.base,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )

    def clip(self) -> None:
        """Shorten the averaged gradient where the run asks for it; it must be complete."""
        longest = self.run.optimiser.clip_norm
        if longest is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), longest)

    @property
    def clips(self) -> bool:
        """Whether `clip` does anything."""
        return self.run.optimiser.clip_norm is not None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over this rank's samples (and their tokens)."""
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def steps(
        self, optimizer: torch.optim.Optimizer, total: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets) of each step; `total` sums a tensor over ranks."""
        run, train = self.run, self._data.train
        assert run.train.steps is not None
        total_samples = run.train.steps * run.batch.batch_global
        order = SampleOrder(len(train), run.seed, self._rank, self._size)
        self.model.train()
        with Loader(train, order, None, run.data.prefetch) as loader:
            for step in range(1, run.train.steps + 1):
                sent, began = link_bytes(), time.perf_counter()
                before = loader.samples_seen
                batch = loader.next(run.batch.batch_global)
                lr = run.lr.lr_at(before, total_samples, len(train), batch.batch_global)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                yield next(iter(batch.micro_batches))
                self._step_s.append(time.perf_counter() - began)
                self._bytes.append(link_bytes() - sent)
                if self._due(step):
                    self._evaluate(step, total)
                    if self._over():
                        break
        if self._rank == 0:
            self._write()

    def _due(self, step: int) -> bool:
        every, last = self.run.evaluate.every_steps, self.run.train.steps
        return step == last or bool(
            every and step % every == 0 and step >= self._args.evaluate_from
        )

    @torch.no_grad()
    def _evaluate(self, step: int, total: Callable[[Tensor], Tensor]) -> None:
        """Mean loss and accuracy over the held-out set, each rank its share of it."""
        test, spec = self._data.test, self._data.spec
        sums = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        first, last = (len(test) * (self._rank + i) // self._size for i in (0, 1))
        for start in range(first, last, self.run.evaluate.batch):
            stop = min(start + self.run.evaluate.batch, last)
            indices = torch.arange(start, stop).numpy()
            parts = per_sample_loss(self.model, spec, *test.batch(indices, epoch=0))
            sums += torch.stack([part.sum() for part in parts]).double()
        self.model.train()
        self._curve.append([step, *(total(sums) / len(test)).tolist()])
        self._curve_s.append(sum(self._step_s[1:]))

    def _over(self) -> bool:
        if not math.isfinite(self._curve[-1][1]):
            return True
        target: Target | None = self._args.target
        return target is not None and target.reached_at(self._curve) is not None

    def _write(self) -> None:
        record = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": len(self._step_s),
            "diverged": any(not math.isfinite(loss) for _, loss, _ in self._curve),
            "curve": [p for p in self._curve if math.isfinite(p[1])],
            "curve_s": self._curve_s,
            "step_s": self._step_s,
            "link_bytes": self._bytes,
        }
        self._args.out.write_text(json.dumps(record))
