"""`hpctrain calibrate`: branches from a checkpoint, how they are compared, what is left alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import critical_batch as study
from hpctrain.api import run_on
from hpctrain.assemble import Options, World
from hpctrain.calibrate import calibrate, lr_factor
from hpctrain.cli import run_command_line
from hpctrain.config import from_mapping, load
from hpctrain.errors import NonFinite, UsageError
from hpctrain.runs.calibration import (
    Branch,
    Calibration,
    Tolerance,
    Wanted,
    block_means,
    smoothed,
)
from hpctrain.runs.manifest import fingerprint, folder_name
from hpctrain.stats.noise import NoiseEstimate
from hpctrain.transport.threads import RankError, run_threads
from tests.golden_run import MLP, step_losses

DIGITS: dict[str, Any] = MLP | {
    "model": {"kind": "mlp", "widths": [24], "dropout": 0.2},
    "lr": {"base": 0.02},
    "batch": {"batch_global": 16},
    "train": {"steps": 64, "dtype": "float64"},
    "checkpoint": {"every_steps": 32},
    "evaluate": {"every_epochs": 0, "replicas": "never"},
}
WANTED = Wanted(most=4, samples=512)
NOISE = NoiseEstimate(101.0, 80.0, 130.0, True, 1.0, 0.01, 50)


def train(tree: dict[str, Any], ranks: int, folder: Path) -> Path:
    """A finished run."""
    loaded, options = from_mapping(tree), Options(out=folder)
    run_threads(ranks, lambda comm: run_on(World(comm), loaded, options), only_waits=True)
    return folder


def find(
    folder: Path, ranks: int, wanted: Wanted, *overrides: str, step: int | None = None
) -> Calibration:
    """What all ranks found, which is the same."""
    loaded, said = load(folder / "config.toml", overrides), []
    where = folder if step is None else folder / "checkpoints" / folder_name(step)
    try:
        found = run_threads(
            ranks,
            lambda comm: calibrate(World(comm), loaded, where, wanted, said.append),
            only_waits=True,
        )
    except RankError as error:
        raise (error.__cause__ or error) from None
    assert found[0] is not None
    assert all(other == found[0] for other in found)
    assert said[-1] == f"written   {folder}/calibration.json"
    return found[0]


def files_of(folder: Path) -> dict[str, Any]:
    return {str(path): fingerprint(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_first_branch_is_what_the_run_itself_did(ranks, tmp_path):
    folder = train(DIGITS, ranks, tmp_path / "run")
    before = files_of(folder)
    found = find(folder, ranks, WANTED, step=32)
    assert found.branches[0].losses == step_losses(folder)[32:]
    assert [b.batch_global for b in found.branches] == [16, 32, 64][: len(found.branches)]
    assert (found.noise is None) == (ranks == 1)
    after = files_of(folder)
    written = json.loads((folder / "calibration.json").read_text())
    del after[f"{folder}/calibration.json"]
    assert after == before
    assert [b["steps"] for b in written["branches"]] == [32, 16, 8][: len(found.branches)]
    assert written["critical_batch"] == found.critical_batch
    assert written["noise_scale_factor"] == found.noise_scale_factor
    assert len(written["branches"][0]["block_losses"]) == 512 // 64


def test_branches_do_not_depend_on_the_number_of_ranks(tmp_path):
    tree = DIGITS | {"model": {"kind": "mlp", "widths": [24]}}
    folder = train(tree, 2, tmp_path / "run")
    losses = [
        [branch.losses for branch in find(folder, ranks, WANTED, step=32).branches]
        for ranks in (1, 2, 3)
    ]
    for other in losses[1:]:
        for branch, expected in zip(other, losses[0], strict=True):
            assert branch == pytest.approx(expected, rel=1e-10)


def test_a_larger_batch_takes_more_passes_of_the_same_size(tmp_path, monkeypatch):
    folder = train(DIGITS, 2, tmp_path / "run")
    shapes: set[tuple[int, int]] = set()
    from hpctrain import calibrate as module

    step = module.train_step

    def watched(session: Any, batch: Any, lr: float, began: float) -> Any:
        shapes.add((len(batch.micro_batches), max(len(t) for _, t in batch.micro_batches)))
        return step(session, batch, lr, began)

    monkeypatch.setattr(module, "train_step", watched)
    find(folder, 2, Wanted(most=4, samples=256, tolerance=Tolerance(9.0)), step=32)
    assert {shape for shape in shapes if shape[1] == 8} == {(1, 8), (2, 8), (4, 8)}
    assert max(size for _, size in shapes) == 8


def test_the_critical_batch_of_a_known_problem_is_found(tmp_path):
    """Least squares with M = 31 diverges where lr_1 L (B + M) >= 2: here from 48 samples."""
    lr = 2.0 / (48 + 31) / study.blocked(2, 0).smoothness
    tree = {
        "data": {"kind": "benchmarks.critical_batch:load_blocks", "args": {"seed": 0}},
        "model": {"kind": "logistic", "bias": False},
        "lr": {"base": 8 * lr},
        "batch": {"batch_global": 8},
        "train": {"steps": 1, "dtype": "float64"},
        "record": {"progress": "none"},
    }
    folder = train(tree, 1, tmp_path / "run")
    wanted = Wanted(most=16, samples=10 * 128, tolerance=Tolerance(0.5))
    found = find(folder, 1, wanted, "batch.measure=on")
    assert (found.critical_batch, found.too_large, found.bound) == (32, 64, "found")
    assert [branch.lr for branch in found.branches] == [8 * lr * k for k in (1, 2, 4, 8)]
    assert found.noise is not None


def test_an_adaptive_run_branches_from_the_batch_it_has_come_to(tmp_path):
    batch = {"kind": "adabatch", "batch_global": 16, "batch_max": 64, "every_epochs": 0.25}
    folder = train(DIGITS | {"batch": batch}, 2, tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "batch_plan.jsonl").read_text().splitlines()]
    now = [line["batch_global"] for line in lines if line["step"] < 32][-1]
    assert now > 16
    found = find(folder, 2, Wanted(most=2, samples=512), step=32)
    assert found.branches[0].batch_global == now
    recorded = step_losses(folder)[32:]
    assert found.branches[0].losses[0] == recorded[0]


def test_replicas_that_meet_are_calibrated_and_others_refused(tmp_path):
    tree = DIGITS | {"exchange": {"kind": "none"}, "sync": [{"kind": "average", "every": 4}]}
    found = find(train(tree, 2, tmp_path / "meet"), 2, WANTED, step=32)
    assert found.branches[0].losses[0] > found.branches[0].losses[-1]
    tree["sync"] = [{"kind": "downpour", "every": 4}]
    with pytest.raises(UsageError, match="calibrate a run whose rules meet"):
        find(train(tree, 2, tmp_path / "apart"), 2, Wanted(most=2))


def test_what_does_not_fit_is_refused(tmp_path):
    tree = DIGITS | {"lr": {"base": 0.02, "schedule": "cosine"}}
    folder = train(tree, 1, tmp_path / "run")
    with pytest.raises(UsageError, match="ends 0 samples after this checkpoint"):
        find(folder, 1, Wanted(most=2))
    with pytest.raises(UsageError, match="at least 64, and at most 512"):
        find(folder, 1, Wanted(most=2, samples=513), step=32)
    assert find(folder, 1, Wanted(most=2), step=32).samples == 512
    with pytest.raises(UsageError, match="is no folder"):
        find(folder, 1, Wanted(), step=31)
    with pytest.raises(UsageError, match="B_S is not known"):
        find(folder, 1, Wanted(most=2, lr="adascale"), step=32)
    with pytest.raises(NonFinite, match="own batch of 16 samples"):
        find(folder, 1, Wanted(most=2), "lr.base=1e200", step=32)
    assert not (tmp_path / "none").exists()
    assert run_command_line(["calibrate", str(tmp_path / "none")]) == 2
    for given_text in ("0", "-1", "x", "nan", "inf%"):
        with pytest.raises(UsageError, match="--tolerance"):
            Tolerance.parse(given_text)
    for most in (0, 1, 3):
        with pytest.raises(UsageError, match="power of two"):
            Wanted(most=most)


def test_a_length_that_is_not_given_is_whole_blocks():
    wanted = Wanted(most=4)
    assert wanted.samples_for(16, 10_000, math.inf) == 5056  # half an epoch, in blocks of 64
    assert wanted.samples_for(100, 1000, math.inf) == 3200  # 8 blocks of 400
    assert wanted.samples_for(100, 1000, 1999.0) == 1600


def test_tolerances():
    assert Tolerance.parse("0.02") == Tolerance(0.02)
    assert Tolerance.parse("5%").allows(2.1, 2.0)
    assert not Tolerance.parse("5%").allows(2.11, 2.0)
    assert not Tolerance(1.0).allows(math.inf, math.inf)
    assert (str(Tolerance.parse("5%")), str(Tolerance(0.01))) == ("5%", "0.01")


def test_factors_of_the_step_size():
    assert [lr_factor("linear", k, 8, None) for k in (1, 4)] == [1.0, 4.0]
    assert [lr_factor("sqrt", k, 8, None) for k in (1, 4)] == [1.0, 2.0]
    assert [lr_factor("none", k, 8, None) for k in (1, 4)] == [1.0, 1.0]
    # S (phi + B) / (phi + S B) with phi = 100
    assert lr_factor("adascale", 4, 25, NOISE) == pytest.approx(4 * 125 / 200)
    assert lr_factor("adascale", 1, 25, None) == 1.0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 30))
def test_blocks_share_out_the_loss(sizes, block):
    samples_T = np.array(sizes, float)
    loss_T = samples_T * np.arange(1.0, len(sizes) + 1)
    means = block_means(loss_T, samples_T, block)
    total = int(samples_T.sum())
    lengths = [min(block, total - start) for start in range(0, total, block)]
    assert len(means) == len(lengths)
    assert np.dot(means, lengths) == pytest.approx(loss_T.sum())
    each = np.repeat(np.arange(1.0, len(sizes) + 1), sizes)
    expected = [each[start : start + block].mean() for start in range(0, total, block)]
    assert means == pytest.approx(expected)


def test_the_average_starts_at_the_first_block():
    assert smoothed([4.0]) == 4.0
    assert smoothed([4.0, 2.0, 1.0]) == 2.0


@pytest.mark.parametrize(
    ("losses", "too_large", "critical", "bound", "line"),
    [
        ([1.0, 1.0, 2.0], 64, 32, "found", "batch.noise_scale_factor = 0.32"),
        ([1.0, 1.0, 1.0], None, 64, "at least", "batch.noise_scale_factor = 0.64  # or more"),
        ([1.0, math.inf], 32, 16, "less than twice", "batch.noise_scale_factor = 0.16  # or less"),
    ],
)
def test_what_is_said_and_written(losses, too_large, critical, bound, line):
    branches = [
        Branch(16 * 2**at, 0.1, [loss], [loss], loss, None) for at, loss in enumerate(losses)
    ]
    found = Calibration("run", 3, 1, 256, "linear", "0.01", branches, too_large, NOISE)
    assert (found.critical_batch, found.bound) == (critical, bound)
    assert found.lines()[-1] == f"config    {line}"
    content = json.loads(found.to_json())
    assert content["branches"][-1]["loss"] == (losses[-1] if math.isfinite(losses[-1]) else None)
    assert content["noise"]["b_s"] == 101.0
