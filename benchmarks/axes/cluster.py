"""Seconds of a step on the virtual cluster, and the flagship as a whole there."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.axes.cases import NODES, ROUND, SKIPPED, UNMEASURED, Case, Line
from benchmarks.axes.count import read_training
from hpctrain.config import Loaded
from hpctrain.errors import EXIT_COMPLETE, EXIT_STOPPED
from hpctrain.runs.lines import read
from hpctrain.toml_text import to_toml

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster

ALONE_SKIPPED, ALONE_STEPS = 8, 24
"""As SKIPPED and ROUND, where nothing meets."""
ENVIRONMENT = {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}


@contextmanager
def started(rate: str) -> Iterator[tuple[Cluster, Path]]:
    """A cluster, and a folder that all of its nodes see."""
    from tests.cluster.cluster import Cluster

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        with Cluster.up(NODES, rate, shared=(folder,)) as cluster:
            yield cluster, folder


def time_steps(cluster: Cluster, folder: Path, variant: str, batch: int, shorter: int = 1) -> Line:
    """Mean seconds of a step at a fixed batch, leaders and all.

    Args:
        cluster: A rank on each node.
        folder: Seen by all nodes.
        variant: Which.
        batch: Of the step, over all ranks.
        shorter: Steps are divided by it, to try things out.
    """
    meets = bool(Case(variant).loaded().run.sync)
    skipped, steps = (SKIPPED, ROUND) if meets else (ALONE_SKIPPED, ALONE_STEPS)
    skipped, steps = skipped // shorter, steps // shorter
    more = (*UNMEASURED, f"batch.batch_global={batch}")
    more += ("record.every_steps=1", "evaluate.every_epochs=0", "data.limit_test=100")
    loaded = Case(variant, 1e-4).loaded(*more, length=f"train.steps={skipped + steps}")
    run = train(cluster, folder, loaded)
    lines = [line for line in read(run / "metrics.jsonl") if line["kind"] == "step"]
    first = next(line for line in lines if line["step"] >= skipped)
    counted = lines[-1]["step"] - first["step"]
    step_s = (lines[-1]["time_s"] - first["time_s"]) / counted
    links = [str(link) for link in cluster.links]
    return {"step_s": float(f"{step_s:.4g}"), "of_steps": counted, "links": links}


def train_whole(cluster: Cluster, folder: Path, case: Case) -> Line:
    """A training on the cluster that stops at the target; seconds without evaluations."""
    run = train(cluster, folder, case.loaded("record.every_steps=1"))
    found, lines = read_training(run), list(read(run / "metrics.jsonl"))
    if found["steps"] is None:
        return found | {"seconds": None}
    began = next(line["time_s"] for line in lines if line["kind"] == "step")
    before = [x for x in lines if x["kind"] == "eval" and x["step"] <= found["steps"]]
    spent = before[-1]["time_s"] - began - sum(line["eval_s"] for line in before)
    return found | {"seconds": round(spent, 1)}


def train(cluster: Cluster, folder: Path, loaded: Loaded) -> Path:
    """Run it with a rank on each node, to its end or to the target; its run folder.

    Raises:
        RuntimeError: it failed.
    """
    run = folder / f"run-{time.time_ns()}"
    config, log = run.with_suffix(".toml"), run.with_suffix(".log")
    config.write_text(to_toml(loaded.run))
    words = [sys.executable, "-m", "hpctrain", "train", str(config), "--out", str(run)]
    with open(log, "w") as sink:
        process = cluster.start(
            cluster.mpirun(words, NODES, 1), extra=ENVIRONMENT, stdout=sink, stderr=sink
        )
        while process.poll() is None:
            time.sleep(1.0)
            if (run / "batch_plan.jsonl").exists() and read_training(run)["steps"] is not None:
                (run / "STOP").touch()
    if process.returncode not in (EXIT_COMPLETE, EXIT_STOPPED):
        raise RuntimeError(f"code {process.returncode}\n{log.read_text()[-4000:]}")
    return run
