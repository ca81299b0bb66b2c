"""Seconds of a step on the virtual cluster, and whole trainings there."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.batch.runs import Case, Log, chosen_lr, target_of
from benchmarks.batch.tasks import CAP, RANKS, SEEDS, START, TASKS, Tree
from benchmarks.batch.train import record_of
from benchmarks.machine import describe_machine
from hpctrain.batch import StepTimes
from hpctrain.config import from_mapping
from hpctrain.runs.lines import read
from hpctrain.toml_text import to_toml

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster

TIMED = (START, 4 * START, 16 * START, 64 * START, CAP)
"""Batches whose steps are timed."""
SKIPPED = 10
"""First steps, which are not."""


def time_steps(args: argparse.Namespace, log: Log) -> None:
    """Steps of fixed batches; tasks and batches take turns in rounds."""
    with started(args.rate) as (cluster, folder):
        for turn in range(args.rounds):
            for task in args.tasks:
                for size in TIMED[:: 1 if turn % 2 == 0 else -1]:
                    tree = timing_tree(task, size, args.steps)
                    load = os.getloadavg()[0]
                    run_folder = train_there(cluster, folder, tree, f"{task}-{size}-{turn}")
                    seconds = step_seconds(run_folder, size)
                    log.append(
                        {
                            "what": "times",
                            "task": task,
                            "batch": size,
                            "rate": args.rate,
                            "step_s": [float(f"{s:.4g}") for s in seconds],
                            "load_average": load,
                            "links": [str(link) for link in cluster.links],
                            "machine": describe_machine(),
                        }
                    )
                    ms = 1e3 * statistics.median(seconds)
                    print(f"times {task}: {size} samples, {ms:.2f} ms", file=sys.stderr)


def train_shaped(args: argparse.Namespace, log: Log) -> None:
    """One training by the policy that measures for itself, to the target."""
    with started(args.rate) as (cluster, folder):
        for task in args.tasks:
            case = Case("run", task, "goodput", SEEDS[0], chosen_lr(log, task))
            tree = case.tree() | {"record": {"every_steps": 1, "progress": "none"}}
            tree["train"] = {"epochs": TASKS[task].epochs * 1.2, "threads": 1}
            load = os.getloadavg()[0]
            run_folder = train_there(cluster, folder, tree, task)
            lines = [x for x in read(run_folder / "metrics.jsonl") if x["kind"] == "step"]
            spent = [[x["step"], x["batch_global"], x["step_s"]] for x in lines]
            found = vars(case) | {"what": "shaped", "rate": args.rate, "steps": spent}
            target = {"target": target_of(log, task, SEEDS), "load_average": load}
            log.append(found | target | record_of(run_folder))


def fitted(log: Log, task: str) -> StepTimes:
    """The line through the medians of all rounds, relative errors counted.

    Raises:
        LookupError: nothing was timed.
    """
    medians = timed(log, task)
    if not medians:
        raise LookupError(f"{task}: run the stage times first")
    batches = np.array(list(medians))
    seconds = np.array(list(medians.values()))
    rows = np.stack([np.ones(len(batches)), batches], axis=1) / seconds[:, None]
    (fixed_s, per_sample_s), *_ = np.linalg.lstsq(rows, np.ones(len(batches)), rcond=None)
    return StepTimes(float(fixed_s), float(per_sample_s))


def timed(log: Log, task: str) -> dict[int, float]:
    """Batch -> median seconds of a step, over all rounds."""
    found: dict[int, list[float]] = {}
    for line in log.lines("times", task):
        found.setdefault(line["batch"], []).append(statistics.median(line["step_s"]))
    return {batch: statistics.median(found[batch]) for batch in sorted(found)}


def timing_tree(task: str, size: int, steps: int) -> Tree:
    """A short training with a fixed batch and no step size to speak of."""
    found = Case("run", task, f"fixed {START}", SEEDS[0], 1e-6).tree()
    return found | {
        "lr": {"base": 1e-6},
        "batch": {"kind": "fixed", "batch_global": size},
        "train": {"steps": steps + SKIPPED, "threads": 1},
        "evaluate": {"every_epochs": 0.0, "batch": 1000},
        "record": {"every_steps": 1, "progress": "none"},
    }


def step_seconds(folder: Path, size: int) -> list[float]:
    """Of every whole step but the first ones. A line tells the seconds of the step before it."""
    steps = [line for line in read(folder / "metrics.jsonl") if line["kind"] == "step"]
    return [
        following["step_s"]
        for line, following in zip(steps, steps[1:], strict=False)
        if line["batch_global"] == size and line["step"] > SKIPPED and following["step_s"]
    ]


@contextmanager
def started(rate: str) -> Iterator[tuple[Cluster, Path]]:
    """A cluster of RANKS nodes, and a folder that all of them see."""
    from tests.cluster.cluster import Cluster

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        with Cluster.up(RANKS, rate, shared=(folder,)) as cluster:
            yield cluster, folder


def train_there(cluster: Cluster, folder: Path, tree: Tree, name: str) -> Path:
    """One training with a rank on each node; its run folder."""
    config = folder / f"{name}.toml"
    config.write_text(to_toml(from_mapping(tree).run))
    words = [sys.executable, "-m", "hpctrain", "train", str(config), "--out", str(folder / name)]
    cluster.run(
        words,
        ranks=RANKS,
        per_node=1,
        timeout_s=1800,
        extra={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
    )
    return folder / name
