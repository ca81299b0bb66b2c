"""Batches that change, through MPI and Horovod: decisions agree, and a plan repeats bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpctrain.api import run_on
from hpctrain.assemble import Options, World
from hpctrain.config import from_mapping
from tests.golden_run import MLP, step_losses

TREE: dict[str, Any] = MLP | {"lr": {"kind": "adascale", "base": 0.05, "reference_batch": 8}}
TREE["train"] = {"epochs": 3}
SHARE = 4
"""Most samples of a pass, in the run and in its replay."""


def run(comm, tree: dict[str, Any], folder: Path, resume: str = "never") -> list[float]:
    """Every step's loss, as rank 0 recorded it."""
    run_on(World(comm), from_mapping(tree), Options(out=folder, resume=resume))
    comm.barrier()
    return step_losses(folder)


def plan(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "batch_plan.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_goodput_is_replayed_bitwise(comm, rank_tmp_path, backend):
    """By measured times, so that no two runs decide alike; the plan holds what was decided."""
    exchange = {"dense_backend": backend, "bucket_mib": 0.002}
    batch = {"kind": "goodput", "batch_global": 8, "batch_max": 64, "micro_batch": SHARE}
    tree = TREE | {"exchange": exchange, "batch": batch}
    first = run(comm, tree, rank_tmp_path / "first")
    decided = plan(rank_tmp_path / "first")
    assert [line["samples"] for line in decided] == sorted({line["samples"] for line in decided})
    assert len(decided) > 3
    tree["batch"] = {"kind": "replay", "plan": str(rank_tmp_path / "first"), "batch_global": 8}
    tree["batch"] |= {"micro_batch": SHARE, "measure": "on" if comm.size == 1 else "auto"}
    assert run(comm, tree, rank_tmp_path / "second") == first


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_noise_decides_and_a_stopped_run_decides_alike(comm, rank_tmp_path, kind):
    exchange = {"kind": kind, "bucket_mib": 0.002} | ({"density": 0.1} if kind == "topk" else {})
    batch = {"kind": "cosine", "batch_global": 16, "batch_max": 64, "measure": "on"}
    tree = MLP | {"exchange": exchange, "batch": batch | {"check_every": 8}}
    tree |= {"lr": {"base": 0.02}, "train": {"steps": 72}}
    whole = run(comm, tree, rank_tmp_path / "whole")
    assert len({line["batch_global"] for line in plan(rank_tmp_path / "whole")}) > 1
    run(comm, tree | {"train": {"steps": 51}}, rank_tmp_path / "parts")
    assert run(comm, tree, rank_tmp_path / "parts", resume="auto") == whole
    assert plan(rank_tmp_path / "parts") == plan(rank_tmp_path / "whole")
