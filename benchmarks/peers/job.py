"""Starts one training of one system, on this host or on a virtual cluster, and reads its record."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.tasks import SYSTEMS, TASKS, System, Task, Tree
from hpctrain.config import from_mapping
from hpctrain.errors import EXIT_STOPPED
from hpctrain.toml_text import to_toml

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
NON_FINITE = "is inf or NaN on rank(s)"
SETTLED_AT = 20
"""hpctrain's link bytes are counted from about this step on."""


@dataclass(frozen=True)
class Job:
    """What to train, and how far."""

    task: str
    system: str
    lr: float
    seed: int
    ranks: int
    per_node: int = 1
    """Ranks on each node."""
    steps: int | None = None
    """At most; None: the task's own."""
    evaluate: bool = True
    """Every so many steps as the task says, else only at the end."""
    to_target: bool = True
    """Stop once the target was held twice in a row."""
    schedule: str = "constant"
    """Of the step size; see `hpctrain.batch.lr`."""

    @property
    def of_task(self) -> Task:
        return TASKS[self.task]

    @property
    def of_system(self) -> System:
        return SYSTEMS[self.system]

    def tree(self) -> Tree:
        """The configuration; a peer's script reads the same one as hpctrain."""
        tree = merged(self.of_task.tables, self.of_system.tables)
        own: Tree = {"seed": self.seed, "lr": {"base": self.lr}, "checkpoint": {"at_end": False}}
        if self.schedule != "constant":
            own["lr"]["schedule"] = self.schedule
        own["record"] = {"every_steps": 25 if self.evaluate else 1, "progress": "none"}
        if self.steps is not None:
            own["train"] = {"steps": self.steps}
        if not self.evaluate:
            tree["evaluate"].pop("every_steps", None)
        return merged(tree, own)

    def fingerprint(self) -> str:
        """Changes when the definitions of the task or the system change."""
        system = self.of_system
        parts = [self.tree(), system.options, dict(system.environment)]
        return f"{zlib.crc32(json.dumps(parts, sort_keys=True).encode()):08x}"


def merged(tree: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """A copy of `tree` with `over` laid on top; another `kind` replaces a whole table."""
    found = {k: dict(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
    for key, value in over.items():
        same = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        if same and value.get("kind", found[key].get("kind")) == found[key].get("kind"):
            found[key] = merged(found[key], value)
        else:
            found[key] = dict(value) if isinstance(value, Mapping) else value
    return found


def run(
    job: Job, *, cluster: Cluster | None = None, folder: Path | None = None, limit_s: float = 7200
) -> dict[str, Any]:
    """One training; what it reached, and the seconds of each step.

    Args:
        job: what to train.
        cluster: `per_node` ranks on each node of it; None: all on this host, hpctrain's ranks as
            threads of one process.
        folder: seen by all nodes of the cluster.
        limit_s: longer is an error.
    """
    with tempfile.TemporaryDirectory(dir=folder) as home:
        path = Path(home)
        config = path / "config.toml"
        config.write_text(to_toml(from_mapping(job.tree()).run))
        began = time.monotonic()
        ours = job.of_system.family == "hpctrain"
        words = _ours(job, config, path, cluster) if ours else _peer(job, config, path, cluster)
        with open(path / "log", "w") as log:
            process = _start(job, words, log, cluster)
            watch = _Watch(job, path / "run", cluster) if ours else None
            code = _wait(process, watch, began + limit_s)
        text = (path / "log").read_text()
        diverged = ours and NON_FINITE in text
        if code not in ((0, EXIT_STOPPED) if ours else (0,)) and not diverged:
            raise RuntimeError(f"{job}: code {code}\n{text[-4000:]}")
        if watch is not None:
            found = watch.record() | {"diverged": diverged}
        else:
            found = json.loads((path / "peer.json").read_text())
        return found | {"wall_s": round(time.monotonic() - began, 1)}


def _ours(job: Job, config: Path, path: Path, cluster: Cluster | None) -> list[str]:
    words = [sys.executable, "-m", "hpctrain", "train"]
    if cluster is None:
        words = [sys.executable, "-m", "benchmarks.peers.threads"]
        words += ["--ranks", str(job.ranks), "--per-node", str(job.per_node)]
    return [*words, str(config), "--out", str(path / "run")]


def _peer(job: Job, config: Path, path: Path, cluster: Cluster | None) -> list[str]:
    script = f"benchmarks.peers.{job.of_system.family}_peer"
    words = [sys.executable, "-m", script, str(config), "--out", str(path / "peer.json")]
    words += ["--evaluate-from", str(job.of_task.evaluate_from), *job.of_system.options]
    if job.to_target:
        words += ["--target", str(job.of_task.target)]
    if job.of_system.family == "ddp":
        address = cluster.plan.address("node1") if cluster else "127.0.0.1"
        words += ["--address", address, "--port", str(_free_port())]
    return words


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _start(job: Job, words: list[str], log: Any, cluster: Cluster | None) -> subprocess.Popen[str]:
    extra = {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": log, "stderr": subprocess.STDOUT}
    if cluster is not None:
        extra |= {"GLOO_SOCKET_IFNAME": "eth0"} | dict(job.of_system.environment)
        return cluster.start(cluster.mpirun(words, job.ranks, job.per_node), extra=extra, **streams)
    processes = 1 if job.of_system.family == "hpctrain" else job.ranks
    return subprocess.Popen(
        ["tools/launch", str(processes), "--", *words],
        cwd=ROOT,
        env=os.environ | extra | {"GLOO_SOCKET_IFNAME": "lo"},
        text=True,
        **streams,
    )


class _Watch:
    """Follows the record of an hpctrain run, and stops the run at the target."""

    def __init__(self, job: Job, folder: Path, cluster: Cluster | None) -> None:
        self._job, self._folder, self._cluster = job, folder, cluster
        self._link: tuple[int, int] | None = None

    def look(self) -> None:
        """Called about every second while the run lasts."""
        if self._job.to_target:
            if self._job.of_task.target.reached_at(self._curve()) is not None:
                (self._folder / "STOP").touch()
        elif self._cluster is not None and self._link is None:
            before = self._steps()
            if before >= SETTLED_AT:
                sent = self._sent()
                self._link = ((before + self._steps()) // 2, sent)

    def record(self) -> dict[str, Any]:
        """As a peer writes it, but link bytes as one mean per step."""
        lines = self._lines("step")
        found: dict[str, Any] = {
            "steps": lines[-1]["step"] if lines else 0,
            "curve": self._curve(),
            "curve_s": self._curve_seconds(lines),
            "step_s": [
                (b["time_s"] - a["time_s"]) / (b["step"] - a["step"])
                for a, b in zip(lines, lines[1:], strict=False)
            ],
            "stated_bytes": [line["bytes_sent_inter"] for line in lines[1:]],
        }
        if self._link is not None:
            step, sent = self._link
            found["link_bytes"] = [(self._sent() - sent) // (found["steps"] - step)]
        return found

    def _curve_seconds(self, steps: list[dict[str, Any]]) -> list[float]:
        """From the end of the first step to each evaluation, less the evaluations."""
        found, evaluating = [], 0.0
        for line in self._evaluations():
            evaluating += line["eval_s"]
            found.append(line["time_s"] - steps[0]["time_s"] - evaluating)
        return found

    def _lines(self, kind: str) -> list[dict[str, Any]]:
        path = self._folder / "metrics.jsonl"
        if not path.exists():
            return []
        texts = path.read_text().rpartition("\n")[0].splitlines()
        lines = [json.loads(text) for text in texts]
        return [line for line in lines if line["kind"] == kind]

    def _evaluations(self) -> list[dict[str, Any]]:
        return [x for x in self._lines("eval") if x["step"] and x["loss"] is not None]

    def _curve(self) -> list[list[float]]:
        return [[x["step"], x["loss"], x["accuracy"]] for x in self._evaluations()]

    def _steps(self) -> int:
        lines = self._lines("step")
        return int(lines[-1]["step"]) if lines else 0

    def _sent(self) -> int:
        assert self._cluster is not None
        return self._cluster.link_bytes()["node1"][0]


def _wait(process: subprocess.Popen[str], watch: _Watch | None, deadline: float) -> int:
    while True:
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                process.kill()
                raise
            if watch is not None:
                watch.look()
