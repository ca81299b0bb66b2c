"""Every file under configs/ is valid, and trains for three steps where its data are at hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hpctrain.api import run_on
from hpctrain.assemble import Options, World
from hpctrain.config import load
from hpctrain.transport.threads import run_threads

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
OWN_DATA = {"digits", "synthetic"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_valid(path):
    assert load(path).run.name == path.stem


def test_the_embedded_run_stands_under_configs():
    assert load(None).run == load(ROOT / "configs" / "digits.toml").run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_three_steps(path, tmp_path, request):
    run = load(path).run
    overrides = ["record.progress=none", "record.every_steps=1", "data.limit_test=64"]
    overrides.append(f"batch.batch_global={min(run.batch.batch_global, 64)}")
    if run.data.kind not in OWN_DATA:
        overrides.append(f"data.root={request.getfixturevalue('data_root')}")
    whole = load(path, overrides)
    train = whole.run.train.model_copy(update={"epochs": None, "steps": 3})
    loaded = replace(whole, run=whole.run.model_copy(update={"train": train}))
    outcomes = run_threads(
        2, lambda comm: run_on(World(comm), loaded, Options(out=tmp_path / "run"))
    )
    own_pace = any(rule.own_pace for rule in run.sync)
    assert all(outcome.complete for outcome in outcomes)
    assert all(outcome.step == 3 or (own_pace and outcome.step > 3) for outcome in outcomes)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert len(losses) == 3 or (run.sync and losses)  # replicas hear from each other now and then
    assert all(math.isfinite(loss) for loss in losses)
