"""One virtual cluster for all tests of this room, and what a user types on it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, missing
from tests.cluster.slurm import Slurm
from tests.recorded import losses

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = {"node1": "leaf1", "node2": "leaf1", "node3": "leaf2", "node4": "leaf2"}
CONFIG = """
name = "job"
[data]
kind = "digits"
[model]
kind = "misbehaving:calm"
args = {{ sleep_s = {sleep_s} }}
[lr]
base = 0.05
[batch]
batch_global = 96
[record]
every_steps = 1
plain_every_s = 0.5
[checkpoint]
every_steps = 20
[evaluate]
every_epochs = 0
[train]
steps = {steps}
"""


def refuse(reason: str) -> None:
    """Skip, or fail where the cluster is required (CI sets HPCTRAIN_REQUIRE_CLUSTER=1)."""
    if os.environ.get("HPCTRAIN_REQUIRE_CLUSTER") == "1":
        pytest.fail(f"{reason}, and HPCTRAIN_REQUIRE_CLUSTER=1")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file system that all nodes share."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def cluster(shared: Path) -> Iterator[Cluster]:
    """Four nodes with links of 1 Gbit/s."""
    if reason := missing():
        refuse(reason)
    with Cluster.up(4, "1gbit", shared=[shared]) as up:
        yield up


@pytest.fixture(scope="session")
def slurm(cluster: Cluster) -> Iterator[Slurm]:
    """SLURM on these nodes: 4 processors each, two leaf switches."""
    if reason := Slurm.missing():
        refuse(reason)
    with Slurm(cluster, topology=SWITCHES) as up:
        yield up


class Site:
    """A user's folder on the cluster's shared file system."""

    def __init__(self, folder: Path, slurm: Slurm | None) -> None:
        self.folder = folder
        self.slurm = slurm
        self.environment = {"PYTHONPATH": str(ROOT / "tests" / "faults")}

    def config(self, steps: int, sleep_s: float = 0.0) -> str:
        """A run on the digits whose steps take at least so long; its file name."""
        path = self.folder / f"steps-{steps}-{sleep_s}.toml"
        path.write_text(CONFIG.format(steps=steps, sleep_s=sleep_s))
        return path.name

    def submit(self, config: str, *options: str, scheduler: str = "slurm") -> str:
        """`hpctrain submit`; the job's id."""
        assert self.slurm
        variables = (f"--env={name}={value}" for name, value in self.environment.items())
        out = self.slurm.call(
            "hpctrain", "submit", config, "--scheduler", scheduler, *variables, *options,
            cwd=self.folder,
        )  # fmt: skip
        found = re.search(r"^job +(\S+)", out, re.MULTILINE)
        assert found, out
        return found[1]

    def log(self, run: str, job: str) -> str:
        return (self.folder / f"{run}.job" / f"slurm-{job}.log").read_text()


@pytest.fixture
def site(tmp_path: Path, slurm: Slurm) -> Site:
    return Site(tmp_path, slurm)


def last_step(run: Path) -> int:
    return max(losses(run), default=0)


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def reach(slurm: Slurm, job: str, run: Path, step: int, limit_s: float = 90) -> None:
    """Wait until a run has recorded a step."""
    until = time.monotonic() + limit_s
    while last_step(run) < step:
        assert time.monotonic() < until, f"step {step} was not reached: {slurm.job(job)}"
        time.sleep(0.1)
