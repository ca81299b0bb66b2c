"""Everything one run holds between its steps, and what the loop asks of it.

The loop (`train.py`) says when things happen; a `Session` knows how. Its methods are collective
unless they say Local, and decide by reduced numbers only.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hpctrain.agreement import Agreement, Heard
from hpctrain.batch.lr import LrConfig
from hpctrain.batch.policy import Decision
from hpctrain.batch_control import BatchControl
from hpctrain.clock import Clock, Every
from hpctrain.config import Run
from hpctrain.control import Maxima, Sums
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.spec import DataSets, Spec
from hpctrain.errors import NonFinite
from hpctrain.exchange import Exchange
from hpctrain.journal import Journal
from hpctrain.measurement import Measurement
from hpctrain.meter import Squares
from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import AppliedUpdate, Optimiser
from hpctrain.randomness import RandomState
from hpctrain.regularise.regularisers import Regularisers
from hpctrain.replicas import Replicas
from hpctrain.runs import signals
from hpctrain.runs.checkpoint import Checkpointer
from hpctrain.state import Counter, State, Stateful
from hpctrain.sync.rule import Moment
from hpctrain.sync.rules import Rules
from hpctrain.sync.trigger import Elapsed
from hpctrain.timing import Stepped, Timing
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.watchdog import Watchdog
from hpctrain.views import Views


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
    batch: BatchControl
    measurement: Measurement
    lr: LrConfig
    clock: Clock
    replicas: Replicas
    agreement: Agreement
    rules: Rules
    regularisers: Regularisers
    views: Views
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
        self._remarks: set[str] = set()
        self._began_s = time.monotonic() - self.clock.seconds

    @property
    def spec(self) -> Spec:
        """What the data look like."""
        return self.data.spec

    def autocast(self) -> AbstractContextManager[None]:
        """Local. bfloat16 autocast where the run asks for it."""
        if self.run.train.autocast == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def decide(self) -> Decision:
        """Collective where the policy asks for the whole data set. What the next step takes."""
        following = self.batch.next(self.clock)
        if following.considered:
            self.journal.decision(self.clock, following.decision, tell=following.changes_batch)
        return following.decision

    def lr_for(self, batch: Batch, gain: float) -> float:
        """Local. The step size of the next step, for as many samples as one update takes."""
        return self.lr.lr_at(
            self.clock.samples,
            self.clock.total_samples,
            self.clock.samples_per_epoch,
            batch.batch_global,
            batch.batch_replica or 1,
            getattr(self.run.exchange, "delay", 0),
            gain=gain,
        )

    def moment(self, lr: float, loss: float, samples: int) -> Moment:
        """Local. The step under way, as [[sync]] rules see it."""
        clock = self.clock
        elapsed = Elapsed(clock.own_step + 1, clock.epoch, clock.step, clock.seconds)
        return Moment(elapsed, lr, loss, samples)

    def vote(
        self, loss: float, correct: float, samples: int, squares: Squares
    ) -> tuple[Sums, Maxima]:
        """Local. What this rank says in the step's control message."""
        sums = replace(
            self.totals,
            loss=loss,
            correct=correct,
            samples=samples,
            steps_done=self.clock.own_step + 1,
            samples_done=self.clock.own_samples + samples,
            non_finite=float(not math.isfinite(loss)),
            **asdict(squares),
        )
        done, failed, wanted = self.checkpoints.numbers()
        code = self.stop.poll(self.checkpoints.save_s)
        return sums, Maxima(code, (done, failed, wanted), time.monotonic() - self._began_s)

    def hear(self, step: Stepped) -> Heard | None:
        """Collective. What all ranks said since the last time; None while it is under way.

        Raises:
            NonFinite: the loss of a replica is inf or NaN and no rule mends that.
        """
        heard = self.agreement.hear(
            self.clock.step, step.own, step.maxima, step.replica, self.clock.done
        )
        if heard is not None:
            self.clock.follow(heard.sums.steps_done, heard.sums.samples_done, self.comm.size)
            self.clock.seconds = heard.maxima.seconds
            self.measurement.hear(heard.sums)
            self.batch.hear(self.clock.step, heard.sums)
        if heard is not None and heard.sums.non_finite and not self.rules.mends:
            raise NonFinite(
                f"the loss of {heard.sums.non_finite:g} update(s) up to step {self.clock.step} was "
                "inf or NaN on some rank, which left the update out. Lower lr.base, lengthen "
                "lr.warmup_epochs or set optimiser.clip_norm; --resume auto starts again from the "
                "last checkpoint"
            )
        return heard

    def stop_reason(self, heard: Heard | None) -> str | None:
        """Local, equal on all ranks. Why all ranks stop after this step; None to go on."""
        if heard is None or not heard.maxima.stop_code:
            return None
        return signals.describe(int(heard.maxima.stop_code))

    def evaluation_due(self) -> bool:
        """Local, equal on all ranks."""
        epochs, steps = self._by_epochs.due(self.clock.epoch), self._by_steps.due(self.clock.step)
        return epochs or steps

    def held_out_batches(self, comm: Communicator) -> Iterator[tuple[Tensor, Tensor]]:
        """Local. This rank's contiguous share of the held-out set, among the ranks of `comm`."""
        n, size, rank = len(self.data.test), comm.size, comm.rank
        mine = np.arange(n * rank // size, n * (rank + 1) // size)
        for start in range(0, len(mine), self.run.evaluate.batch):
            indices = mine[start : start + self.run.evaluate.batch]
            inputs, targets = self.data.test.batch(indices, epoch=0)
            yield inputs.to(self.device), targets.to(self.device)

    def replicas_due(self) -> bool:
        """Local, equal on all ranks. Whether this evaluation measures every replica too."""
        wanted = {"always"} | ({"end"} if self.clock.done else set())
        return self.replicas.count > 1 and self.run.evaluate.replicas in wanted

    def record_step(self, heard: Heard | None, batch: Batch, lr: float, timing: Timing) -> None:
        """Local. Count, write and show a step."""
        ledger = self.comm.ledger
        self.journal.step(
            self.clock,
            None if heard is None else heard.sums,
            batch.batch_global,
            len(batch.micro_batches),
            lr,
            ledger.source,
            self.exchange.tally(),
            self.rules.tally(),
            self.regularisers.tally(),
            self.measurement.tally,
        )
        for remark in [*self.rules.remarks(), *self.measurement.remarks()]:
            if remark not in self._remarks:
                self._remarks.add(remark)
                self.journal.note(self.clock, remark)
        self.totals = replace(
            timing.added_to(self.totals, batch.batch_local),
            measure_s=self.measurement.seconds,
            bytes_sent_intra=ledger.bytes_sent_intra,
            bytes_sent_inter=ledger.bytes_sent_inter,
        )

    def record_evaluation(self, results: dict[str, float], eval_s: float) -> None:
        """Local. Write and show an evaluation."""
        self.results = results
        self.journal.evaluation(self.clock, results, eval_s)

    def summarise(self, following: Sequence[str]) -> None:
        """Collective. Show the closing table."""
        totals = self.agreement.total(self.totals)
        self.journal.summary(self.results, totals, self.comm.ledger.source, following)

    def save_if_due(self, heard: Heard | None) -> None:
        """Local, equal on all ranks. Move the checkpoint under way on; start one that is due.

        Raises:
            WriteError: a save failed and `checkpoint.on_error = "stop"`.
        """
        if heard is not None:
            self.journal.checkpoint(self.clock, self.checkpoints.advance(heard.maxima.saves))
        if self.checkpoints.due(self.clock.step):
            self.rules.settle()
            self.measurement.settle()
            self.checkpoints.save(self.clock.step, self.parts())

    def save_and_wait(self, *, stopped: bool) -> None:
        """Collective. The run's last save, on disk when this returns.

        Raises:
            WriteError: it failed, and the run was stopped or `checkpoint.on_error = "stop"`.
        """
        self.watchdog.beat(self.clock.step, "checkpoint")
        self.agreement.drain()
        self.rules.settle()
        self.measurement.settle()
        outcome = self.checkpoints.finish(
            self.clock.step, self.parts(), self.agreement.reduce_max, stopped=stopped
        )
        self.journal.checkpoint(self.clock, outcome)

    def finish_save(self) -> None:
        """Collective. Wait for the save under way, if any."""
        self.journal.checkpoint(self.clock, self.checkpoints.drain(self.agreement.reduce_max))

    def parts(self) -> dict[str, State]:
        """Local. The state of every component, for a checkpoint."""
        parts = {name: part.state() for name, part in self._stateful().items()}
        for name in ("model", "optimiser", "exchange", "sync", "regulariser"):
            parts[name] = self.replicas.each_its_own(parts[name])
        fired: dict[str, Counter] = {
            "by_epochs": self._by_epochs.fired,
            "by_steps": self._by_steps.fired,
        }
        return parts | {
            "evaluation": State(counters=fired),
            "replicas": State(counters={"of_rank": " ".join(map(str, self.replicas.of_rank))}),
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
            "sync": self.rules,
            "regulariser": self.regularisers,
            "batch": self.batch,
            "measurement": self.measurement,
            "random": self.random,
        }
