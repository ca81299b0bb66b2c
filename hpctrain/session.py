"""Everything one run holds between its steps, and what the loop asks of it.

The loop (`train.py`) says when things happen; a `Session` knows how. Its methods are collective
unless they say Local, and decide by reduced numbers only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hpctrain.batch import BatchPolicy
from hpctrain.batch.lr import LrConfig
from hpctrain.clock import Clock, Every
from hpctrain.config import Run
from hpctrain.control import Control, Maxima, Sums
from hpctrain.data.loader import Loader
from hpctrain.data.spec import DataSets, Spec
from hpctrain.exchange import Exchange
from hpctrain.journal import Journal
from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import AppliedUpdate, Optimiser
from hpctrain.randomness import RandomState
from hpctrain.runs import signals
from hpctrain.runs.checkpoint import Checkpointer
from hpctrain.state import State, Stateful
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.watchdog import Watchdog


@dataclass(frozen=True)
class Timing:
    """Seconds of one step on this rank."""

    step_s: float
    compute_s: float
    exchange_s: float
    input_s: float


@dataclass
class Session:
    """One run on this rank; `assemble.open_session` makes it."""

    run: Run
    comm: Communicator
    device: torch.device
    data: DataSets
    loader: Loader
    flat: FlatModel
    optimiser: Optimiser | AppliedUpdate
    exchange: Exchange
    policy: BatchPolicy
    lr: LrConfig
    clock: Clock
    control: Control
    random: RandomState
    watchdog: Watchdog
    journal: Journal
    stop: signals.StopRequest
    checkpoints: Checkpointer
    results: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    totals: Sums = field(default_factory=Sums)
    """This rank's seconds and bytes since the start."""

    def __post_init__(self) -> None:
        self._by_epochs = Every(self.run.evaluate.every_epochs)
        self._by_steps = Every(self.run.evaluate.every_steps)

    @property
    def spec(self) -> Spec:
        """What the data look like."""
        return self.data.spec

    def autocast(self) -> AbstractContextManager[None]:
        """Local. bfloat16 autocast where the run asks for it."""
        if self.run.train.autocast == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def lr_for(self, batch_global: int) -> float:
        """Local. The step size of the next step."""
        return self.lr.lr_at(
            self.clock.samples, self.clock.total_samples, self.clock.samples_per_epoch, batch_global
        )

    def vote(self, loss: float, correct: float) -> tuple[Sums, Maxima]:
        """Local. What this rank says in the step's control message."""
        sums = replace(
            self.totals, loss=loss, correct=correct, non_finite=float(not math.isfinite(loss))
        )
        done, failed, wanted = self.checkpoints.numbers()
        return sums, Maxima(self.stop.poll(self.checkpoints.save_s), (done, failed, wanted))

    def stop_reason(self, agreed: Maxima) -> str | None:
        """Local, equal on all ranks. Why all ranks stop after this step; None to go on."""
        return signals.describe(int(agreed.stop_code)) if agreed.stop_code else None

    def evaluation_due(self) -> bool:
        """Local, equal on all ranks."""
        epochs, steps = self._by_epochs.due(self.clock.epoch), self._by_steps.due(self.clock.step)
        return epochs or steps

    def held_out_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Local. This rank's contiguous share of the held-out set."""
        n, size, rank = len(self.data.test), self.comm.size, self.comm.rank
        mine = np.arange(n * rank // size, n * (rank + 1) // size)
        for start in range(0, len(mine), self.run.evaluate.batch):
            indices = mine[start : start + self.run.evaluate.batch]
            inputs, targets = self.data.test.batch(indices, epoch=0)
            yield inputs.to(self.device), targets.to(self.device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Collective. Evaluation mode, with float buffers averaged over ranks inside the block."""
        own = {name: buffer.clone() for name, buffer in self.flat.buffers.items()}
        for buffer in self.flat.buffers.values():
            if buffer.is_floating_point():
                mean = buffer.to("cpu", torch.float64)
                self.comm.allreduce(mean.numpy())
                buffer.copy_(mean / self.comm.size)
        self.flat.module.eval()
        try:
            yield
        finally:
            self.flat.module.train()
            for name, buffer in self.flat.buffers.items():
                buffer.copy_(own[name])

    def record_step(self, agreed: Sums, batch_global: int, lr: float, timing: Timing) -> None:
        """Local. Count, write and show a step."""
        ledger = self.comm.ledger
        self.journal.step(
            self.clock, agreed, batch_global, lr, ledger.source, self.exchange.tally()
        )
        self.totals = Sums(
            step_s=self.totals.step_s + timing.step_s,
            compute_s=self.totals.compute_s + timing.compute_s,
            exchange_s=self.totals.exchange_s + timing.exchange_s,
            input_s=self.totals.input_s + timing.input_s,
            bytes_sent_intra=ledger.bytes_sent_intra,
            bytes_sent_inter=ledger.bytes_sent_inter,
        )

    def record_evaluation(self, results: dict[str, float], eval_s: float) -> None:
        """Local. Write and show an evaluation."""
        self.results = results
        self.journal.evaluation(self.clock, results, eval_s)

    def summarise(self, following: Sequence[str]) -> None:
        """Collective. Show the closing table."""
        self.control.start(self.totals, Maxima())
        totals, _ = self.control.wait()
        self.journal.summary(self.results, totals, self.comm.ledger.source, following)

    def save_if_due(self, agreed: Maxima) -> None:
        """Local, equal on all ranks. Move the checkpoint under way on; start one that is due.

        Raises:
            WriteError: a save failed and `checkpoint.on_error = "stop"`.
        """
        self.journal.checkpoint(self.clock, self.checkpoints.advance(agreed.saves))
        if self.checkpoints.due(self.clock.step):
            self.checkpoints.save(self.clock.step, self.parts())

    def save_and_wait(self, *, stopped: bool) -> None:
        """Collective. The run's last save, on disk when this returns.

        Raises:
            WriteError: it failed, and the run was stopped or `checkpoint.on_error = "stop"`.
        """
        self.watchdog.beat(self.clock.step, "checkpoint")
        outcome = self.checkpoints.finish(
            self.clock.step, self.parts(), self.control.reduce_max, stopped=stopped
        )
        self.journal.checkpoint(self.clock, outcome)

    def finish_save(self) -> None:
        """Collective. Wait for the save under way, if any."""
        self.journal.checkpoint(self.clock, self.checkpoints.drain(self.control.reduce_max))

    def parts(self) -> dict[str, State]:
        """Local. The state of every component, for a checkpoint."""
        return {name: part.state() for name, part in self._stateful().items()} | {
            "evaluation": State(
                counters={"by_epochs": self._by_epochs.fired, "by_steps": self._by_steps.fired}
            )
        }

    def load(self, parts: dict[str, State]) -> None:
        """Local. Take every component's state back.

        Raises:
            ConfigError: the checkpoint is of another model, optimiser or order.
        """
        for name, part in self._stateful().items():
            part.load_state(parts[name])
        fired = parts["evaluation"].counters
        self._by_epochs.fired = int(fired["by_epochs"] or 0)
        self._by_steps.fired = int(fired["by_steps"] or 0)

    def _stateful(self) -> dict[str, Stateful]:
        return {
            "clock": self.clock,
            "model": self.flat,
            "optimiser": self.optimiser,
            "order": self.loader,
            "exchange": self.exchange,
            "batch": self.policy,
            "random": self.random,
        }
