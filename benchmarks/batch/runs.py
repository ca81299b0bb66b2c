"""What a training is, and the log of those that are finished: a JSON line each."""

from __future__ import annotations

import json
import math
import statistics
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.batch.target import level
from benchmarks.batch.tasks import FIXED_START, TASKS, TUNING_SEED, Method, Task, Tree, methods
from benchmarks.batch.train import train
from hpctrain.batch import StepTimes

Line = dict[str, Any]

BEYOND = 3.0
"""A training that has not reached the target after so many budgets is given up."""
START_BEYOND = 1.5
"""The same for the start batch, whose trainings are what the target is made of."""


@dataclass(frozen=True)
class Case:
    """One training."""

    what: str
    """lr: one of the grid; start: of the start batch; run: of another method; final: of equal
    length, with a falling step size."""
    task: str
    method: str
    seed: int
    lr: float

    @property
    def of_task(self) -> Task:
        return TASKS[self.task]

    @property
    def of_method(self) -> Method:
        return methods(self.of_task)[self.method]

    def tree(self) -> Tree:
        """Its configuration."""
        task, method = self.of_task, self.of_method
        final = self.what == "final"
        epochs: float = task.epochs
        if self.what in ("start", "run"):
            epochs *= START_BEYOND if self.what == "start" else BEYOND
        tables = task.tables | (task.final if final else {})
        return tables | {
            "seed": self.seed,
            "lr": {"base": self.lr, "schedule": "cosine" if final else "constant"} | method.lr,
            "batch": method.batch,
            "train": {"epochs": epochs, "threads": 1},
            "evaluate": {"every_epochs": 0.0 if final else task.every_epochs, "batch": 1000},
            "record": {"every_steps": 100_000, "progress": "none"},
            "checkpoint": {"at_end": False},
        }


class Log:
    """Finished trainings and timings. A line is in use while its configuration is today's."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self, what: str, task: str) -> list[Line]:
        """Of one kind and task, oldest first."""
        if not self._path.exists():
            return []
        lines = map(json.loads, self._path.read_text().splitlines())
        return [line for line in lines if line["what"] == what and line["task"] == task]

    def append(self, line: Line) -> None:
        """Write one line in one piece."""
        with open(self._path, "a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def find(self, case: Case, times: StepTimes | None = None, target: float = 0.0) -> Line | None:
        """The newest training of a case, with these times and up to this target or beyond it."""
        sign = fingerprint(case, times)
        for line in reversed(self.lines(case.what, case.task)):
            whole = not line["target"]
            alike = line["target"] <= target and line.get("span") == case.of_task.span
            if line["fingerprint"] == sign and (whole or alike):
                return line
        return None


def fingerprint(case: Case, times: StepTimes | None) -> str:
    """Changes with the configuration, and with what the policy is told of the times."""
    told = [f"{times.fixed_s:.3g}", f"{times.per_sample_s:.3g}"] if times else []
    return f"{zlib.crc32(json.dumps([case.tree(), told], sort_keys=True).encode()):08x}"


def once(log: Log, case: Case, *, times: StepTimes | None = None, target: float = 0.0) -> Line:
    """The training of a case: from the log, or made now."""
    told = times if case.of_method.timed else None
    found = log.find(case, told, target)
    if found is None:
        ranks = case.of_method.ranks
        until = {"target": target, "span": case.of_task.span}
        found = vars(case) | {"fingerprint": fingerprint(case, told)} | until
        found |= train(case.tree(), ranks, times=told, **until)
        log.append(found)
        print(
            f"{case.what} {case.task}: {case.method}, lr {case.lr:g}, seed {case.seed}: "
            f"{found['curve'][-1]}, target {target:.4f}, {found['cpu_s']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return found


def loss_at_budget(line: Line) -> float:
    """The level of the loss at the budget; inf where the training did not get so far."""
    task, curve = TASKS[line["task"]], line["curve"]
    within = [point for point in curve if point[1] <= task.budget]
    return level(within, task.span) if curve[-1][1] >= task.budget else math.inf


def tuning(task: str) -> Iterator[Case]:
    """The grid of step sizes at the start batch."""
    for lr in TASKS[task].lrs:
        yield Case("lr", task, FIXED_START, TUNING_SEED, lr)


def chosen_lr(log: Log, task: str) -> float:
    """The step size with the smallest loss at the budget.

    Raises:
        LookupError: the grid has not been run.
    """
    lines = [log.find(case) for case in tuning(task)]
    if None in lines:
        raise LookupError(f"{task}: run the stage lr first")
    best = min(lines, key=lambda line: loss_at_budget(line or {}))
    assert best is not None
    return float(best["lr"])


def target_of(log: Log, task: str, seeds: Sequence[int]) -> float:
    """Mean over seeds of the start batch's loss at the budget.

    Raises:
        LookupError: those trainings have not been run.
    """
    lr = chosen_lr(log, task)
    lines = [log.find(Case("start", task, FIXED_START, seed, lr)) for seed in seeds]
    losses = [loss_at_budget(line) for line in lines if line is not None]
    if len(losses) < len(seeds):
        raise LookupError(f"{task}: run the stage start first")
    return statistics.fmean(losses)
