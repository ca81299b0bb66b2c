"""The loop on threads: losses do not depend on the number of ranks, and golden losses hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hpctrain.api import Outcome, run_on
from hpctrain.assemble import Options, World
from hpctrain.config import from_mapping
from hpctrain.errors import NonFinite
from hpctrain.transport.threads import run_threads
from tests.golden_run import GOLDEN, MLP, step_losses

CNN: dict[str, Any] = MLP | {
    "name": "cnn",
    "model": {"kind": "cnn", "channels": [4, 8], "hidden": 16},
    "optimiser": {"kind": "adamw", "clip_norm": 0.5},
    "lr": {"base": 0.01},
    "batch": {"batch_global": 50, "micro_batch": 7},
}


def train_threads(tree: dict[str, Any], size: int, folder: Path, **options: Any) -> list[Outcome]:
    loaded = from_mapping(tree)
    return run_threads(
        size, lambda comm: run_on(World(comm), loaded, Options(out=folder, **options))
    )


@pytest.mark.parametrize("tree", [MLP, CNN], ids=["mlp-sgd", "cnn-adamw-micro"])
def test_float64_losses_do_not_depend_on_the_number_of_ranks(tree, tmp_path):
    losses = {}
    for size in (1, 2, 3, 4):
        train_threads(tree, size, tmp_path / str(size))
        losses[size] = step_losses(tmp_path / str(size))
    assert len(losses[1]) == 30
    for size in (2, 3, 4):
        assert losses[size] == pytest.approx(losses[1], rel=1e-12, abs=0)


def test_float32_losses_agree_over_the_first_steps(tmp_path):
    tree = MLP | {"train": {"steps": 10}}
    train_threads(tree, 1, tmp_path / "1")
    for size in (2, 3, 4):
        train_threads(tree, size, tmp_path / str(size))
        expected = pytest.approx(step_losses(tmp_path / "1"), rel=1e-5, abs=0)
        assert step_losses(tmp_path / str(size)) == expected


@pytest.mark.parametrize("tree", [MLP, CNN], ids=["mlp-sgd", "cnn-adamw-micro"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_golden_losses(tree, size, tmp_path):
    train_threads(tree, size, tmp_path / "run")
    losses = step_losses(tmp_path / "run")[:20]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN") == "1":
        golden[tree["name"]] = losses
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    assert losses == pytest.approx(golden[tree["name"]], rel=1e-10)


def test_continued_at_other_sizes_equals_one_run(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tree = MLP | {"lr": {"base": 0.1}}
    train_threads(tree, 2, whole)
    for size, steps in ((4, 9), (2, 20), (3, 30)):
        part = tree | {"train": {"steps": steps, "dtype": "float64"}}
        outcomes = train_threads(part, size, parts, resume="auto" if steps > 9 else "never")
        assert all(outcome.complete and outcome.step == steps for outcome in outcomes)
    assert step_losses(parts) == pytest.approx(step_losses(whole), rel=1e-12, abs=0)


def test_resume_is_bitwise_with_dropout(tmp_path):
    tree = MLP | {"model": {"kind": "mlp", "widths": [24], "dropout": 0.3}}
    tree["lr"] = {"base": 0.1}
    train_threads(tree, 3, tmp_path / "whole")
    train_threads(tree | {"train": {"steps": 11, "dtype": "float64"}}, 3, tmp_path / "parts")
    train_threads(tree, 3, tmp_path / "parts", resume="auto")
    assert step_losses(tmp_path / "parts") == step_losses(tmp_path / "whole")


def test_fewer_samples_than_ranks(tmp_path):
    tree = MLP | {"batch": {"batch_global": 3}, "train": {"steps": 8, "dtype": "float64"}}
    train_threads(tree, 1, tmp_path / "1")
    train_threads(tree, 4, tmp_path / "4")
    assert step_losses(tmp_path / "4") == pytest.approx(step_losses(tmp_path / "1"), rel=1e-12)


def test_dry_run_takes_one_batch_and_writes_no_file(tmp_path, capsys):
    folder = tmp_path / "run"
    tree = MLP | {"record": {"progress": "plain"}}
    outcomes = train_threads(tree, 2, folder, dry_run=True)
    assert [(o.folder, o.step, o.complete) for o in outcomes] == [(None, 0, False)] * 2
    assert not folder.exists()
    assert "one batch of 50 samples" in capsys.readouterr().out


def test_autocast_without_a_gpu_is_refused(tmp_path):
    tree = MLP | {"train": {"steps": 3, "autocast": "bfloat16", "device": "auto"}}
    with pytest.raises(Exception, match="this run is on the CPU"):
        train_threads(tree, 1, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_short_last_batch_counts_by_its_true_size(tmp_path):
    tree = MLP | {"batch": {"batch_global": 1000}, "train": {"epochs": 2, "dtype": "float64"}}
    train_threads(tree, 2, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    sizes = [line["batch_global"] for line in lines if line["kind"] == "step"]
    epoch = sum(sizes[: len(sizes) // 2])
    assert sizes[0] == 1000
    assert sizes == [1000, epoch - 1000] * 2


def test_divergence_is_refused_before_the_update(tmp_path):
    tree = MLP | {"lr": {"base": 1e300}, "train": {"steps": 30, "dtype": "float32"}}
    with pytest.raises(Exception, match="inf or NaN") as caught:
        train_threads(tree, 2, tmp_path / "run")
    cause = caught.value if isinstance(caught.value, NonFinite) else caught.value.__cause__
    assert isinstance(cause, NonFinite)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 70)
