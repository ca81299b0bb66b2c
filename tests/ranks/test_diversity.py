"""`hpctrain diversity` under the launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpctrain.appraisal import appraise
from hpctrain.assemble import World
from hpctrain.config import from_mapping
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import run_threads

TREE = {
    "data": {"kind": "synthetic", "n_train": 101, "features": 8, "n_test": 10},
    "model": {"kind": "mlp", "widths": [6]},
    "batch": {"batch_global": 16},
    "lr": {"base": 0.1},
    "train": {"steps": 1, "dtype": "float64"},
}


@pytest.mark.ranks(1, 2, 3, 4)
def test_equal_to_one_rank(comm: Communicator) -> None:
    loaded = from_mapping(TREE)
    found = appraise(loaded, World(comm), rank_samples=40)
    (alone,) = run_threads(1, lambda one: appraise(loaded, World(one), rank_samples=40))
    assert found.diversity.b_s == pytest.approx(alone.diversity.b_s, rel=1e-10)
    assert found.rank == pytest.approx(alone.rank, rel=1e-6)
    said = comm.allgather_bytes(found.to_json().encode())
    assert len(set(said)) == 1


@pytest.mark.ranks(1)
def test_one_table_and_one_file(run_ranks: object, tmp_path: Path) -> None:
    record = tmp_path / "found.json"
    arguments = ("-m", "hpctrain", "diversity", "--samples", "64", "--erank", "0")
    done = run_ranks(2, *arguments, "--json", record)  # type: ignore[operator]
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("gradient diversity of") == 1
    assert json.loads(record.read_text())["ranks"] == "2 ranks on 1 node"


@pytest.mark.ranks(1)
def test_a_missing_checkpoint_ends_all_ranks(run_ranks: object, tmp_path: Path) -> None:
    done = run_ranks(2, "-m", "hpctrain", "diversity", "--checkpoint", tmp_path)  # type: ignore[operator]
    assert done.returncode == 2
    assert done.stderr.count("holds no checkpoint") == 1
