"""The batched form of a run (benchmarks) computes what hpctrain does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import batched
from hpctrain.api import run_on
from hpctrain.assemble import Options, World
from hpctrain.config import from_mapping
from hpctrain.transport.threads import run_threads
from tests.golden_run import MLP

RANKS = 4
BASE: dict[str, Any] = MLP | {
    "batch": {"batch_global": 64},
    "train": {"steps": 20},
    "optimiser": {"momentum": 0.9, "weight_decay": 1e-3},
    "lr": {"base": 0.05, "schedule": "step", "milestones": [0.5]},
}
NONE = {"exchange": {"kind": "none"}}
CASES: dict[str, dict[str, Any]] = {
    "csgd": {"exchange": {"kind": "dense"}},
    "ring": NONE | {"sync": [{"kind": "gossip", "graph": "ring"}]},
    "one_peer": NONE | {"sync": [{"kind": "gossip", "graph": "one_peer"}]},
    "sam": {"regulariser": [{"kind": "sam", "form": "average", "rho": 1.0}]},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_hpctrain(name, tmp_path):
    loaded = from_mapping(BASE | CASES[name])
    options = Options(out=tmp_path / "run")
    run_threads(RANKS, lambda comm: run_on(World(comm), loaded, options), only_waits=True)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = next(line for line in lines if line["kind"] == "eval")
    task = batched.Task.of(loaded.run)
    lengths = {0: 1.0} if name == "sam" else None
    *_, last = batched.train(loaded.run, task, RANKS, lengths)
    mean = last.replicas.params_RP.mean(0, keepdim=True)
    losses, accuracies = last.replicas.evaluate(mean, task.test)
    assert float(losses) == pytest.approx(expected["loss"], rel=1e-4)
    assert float(accuracies) == pytest.approx(expected["accuracy"], abs=1e-6)
