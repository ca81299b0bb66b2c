"""Whole runs whose batch changes, on threads: measured under every exchange, and repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.api import Outcome, run_on
from hpctrain.assemble import Options, World
from hpctrain.config import from_mapping
from hpctrain.errors import ConfigError
from hpctrain.runs import manifest
from hpctrain.transport.threads import RankError, run_threads
from tests.golden_run import MLP
from tests.recorded import lines, losses

TREE: dict[str, Any] = MLP | {"lr": {"base": 0.05}, "evaluate": {"every_epochs": 0}}
TREE["train"] = {"steps": 60}


def train(
    tree: dict[str, Any], size: int, folder: Path, node_of: list[int] | None = None, **options: Any
) -> list[Outcome]:
    loaded = from_mapping(tree)
    return run_threads(
        size,
        lambda comm: run_on(World(comm), loaded, Options(out=folder, **options)),
        node_of=node_of,
    )


def parameters(folder: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, bit for bit."""
    last = manifest.latest(folder / "checkpoints")
    assert last is not None
    return {path.name: path.read_bytes() for path in last.path.glob("*.safetensors")}


def plan(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "batch_plan.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def write_plan(path: Path, decisions: list[tuple[int, int, float]]) -> None:
    """(samples, batch_global, lr_gain) lines."""
    keys = ("samples", "batch_global", "lr_gain")
    path.write_text("".join(json.dumps(dict(zip(keys, d, strict=True))) + "\n" for d in decisions))


def test_measuring_changes_no_bit_of_a_run(tmp_path):
    for measure in ("off", "auto", "on"):
        train(TREE | {"batch": {"batch_global": 24, "measure": measure}}, 3, tmp_path / measure)
    whole = losses(tmp_path / "off")
    assert losses(tmp_path / "auto") == losses(tmp_path / "on") == whole
    assert lines(tmp_path / "auto")[-1]["bs_low"] is not None
    assert lines(tmp_path / "off")[-1]["bs_low"] is None


EXCHANGES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "dense_backend": "mpi"},
    "topk": {"kind": "topk", "density": 0.05},
    "powersgd": {"kind": "powersgd", "matrix_rank": 2},
    "quantise": {"kind": "quantise"},
    "delayed": {"kind": "delayed", "delay": 2},
    "local": {"kind": "none"},
    "node": {"kind": "dense", "dense_backend": "mpi", "scope": "node"},
}
RULE = {"kind": "average", "every": 4}


@pytest.mark.parametrize("name", EXCHANGES)
def test_noise_decides_under_every_exchange(name, tmp_path):
    """By a policy without times, so that a resumed run is bitwise the one that was not stopped."""
    batch = {
        "kind": "cosine",
        "target": 0.9,
        "batch_global": 16,
        "batch_max": 128,
        "check_every": 8,
        "measure": "on",
    }
    tree = TREE | {"exchange": EXCHANGES[name], "batch": batch, "train": {"steps": 104}}
    if name in ("local", "node"):
        tree["sync"] = [RULE]
    nodes = [0, 0, 1, 1] if name == "node" else [0, 1]
    size = len(nodes)
    train(tree, size, tmp_path / "whole", nodes)
    found = lines(tmp_path / "whole")[-1]
    assert found["bs_low"] >= 1.0
    batches = {line["batch_global"] for line in plan(tmp_path / "whole")}
    assert len(batches) > 1
    train(tree | {"train": {"steps": 91}}, size, tmp_path / "parts", nodes)
    train(tree, size, tmp_path / "parts", nodes, resume="auto")
    assert plan(tmp_path / "parts") == plan(tmp_path / "whole")
    assert parameters(tmp_path / "parts") == parameters(tmp_path / "whole")


def test_asynchronous_rules_refuse_what_they_cannot_measure(tmp_path):
    tree = TREE | {"exchange": {"kind": "none"}, "sync": [{"kind": "downpour", "every": 4}]}
    tree["batch"] = {"batch_global": 16, "measure": "on"}
    with pytest.raises(RankError) as raised:
        train(tree, 2, tmp_path / "run")
    assert isinstance(raised.value.__cause__, ConfigError)
    assert "own pace" in str(raised.value)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_sequence_of_batches_is_repeated_bitwise(size, data, tmp_path_factory):
    """Every sample once per epoch, and the replayed plan gives the same bits."""
    folder = tmp_path_factory.mktemp("replay")
    changes = data.draw(
        st.lists(
            st.tuples(st.integers(1, 90), st.integers(1, 97), st.floats(0.25, 2.0)), max_size=8
        )
    )
    decisions, at = [(0, 16, 1.0)], 0
    for gap, batch, gain in changes:
        at += gap
        decisions.append((at, batch, gain))
    write_plan(folder / "given.jsonl", decisions)
    n = 60
    tree = TREE | {"data": {"kind": "digits", "limit_train": n}, "train": {"epochs": 2}}
    for name, read in (("first", folder / "given.jsonl"), ("second", folder / "first")):
        tree["batch"] = {"kind": "replay", "plan": str(read), "batch_global": 16, "micro_batch": 7}
        outcomes = train(tree | {"record": {"every_steps": 1}}, size, folder / name)
        assert all(outcome.complete for outcome in outcomes)
        assert sum(line["batch_global"] for line in lines(folder / name)) == 2 * n
    assert parameters(folder / "first") == parameters(folder / "second")
    assert losses(folder / "first") == losses(folder / "second")


def test_a_run_by_measured_times_is_replayed_bitwise(tmp_path):
    batch = {"kind": "goodput", "batch_global": 8, "batch_max": 256, "check_every": 5}
    tree = TREE | {"batch": batch, "lr": {"kind": "adascale", "base": 0.05, "reference_batch": 8}}
    tree["train"] = {"epochs": 4}
    train(tree, 2, tmp_path / "first")
    decided = plan(tmp_path / "first")
    assert len(decided) > 3
    assert all(line["reason"] for line in decided)
    tree["batch"] = {"kind": "replay", "plan": str(tmp_path / "first"), "batch_global": 8}
    tree["batch"]["micro_batch"] = 4  # what goodput takes: the share of the start batch
    train(tree, 2, tmp_path / "second")
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    assert _model(tmp_path / "second") == _model(tmp_path / "first")


def _model(folder: Path) -> dict[str, list[float]]:
    from safetensors.torch import load_file

    last = manifest.latest(folder / "checkpoints")
    assert last is not None
    tensors = load_file(last.path / manifest.REPLICATED)
    return {
        name: tensor.flatten().tolist()
        for name, tensor in tensors.items()
        if name.startswith("model.") and tensor.dtype == torch.float32
    }


def test_the_peak_of_memory_does_not_move(tmp_path):
    """A share of a grown batch is taken in passes of the start's share."""
    write_plan(tmp_path / "given.jsonl", [(0, 16, 1.0), (64, 96, 1.0)])
    tree = TREE | {"train": {"epochs": 1}, "record": {"every_steps": 1}}
    tree["batch"] = {"kind": "replay", "plan": str(tmp_path / "given.jsonl"), "batch_global": 16}
    train(tree, 2, tmp_path / "run")
    passes = {line["batch_global"]: line["passes"] for line in lines(tmp_path / "run")}
    assert (passes[16], passes[96]) == (1, 6)


@pytest.mark.parametrize("estimator", ["epoch", "oracle"])
def test_divebatch_resizes_by_the_epoch(estimator, tmp_path):
    """The oracle's number is that of `hpctrain diversity` at the end of the epoch."""
    batch = {"kind": "divebatch", "batch_global": 16, "batch_max": 96, "resize_every": 1}
    tree = TREE | {"batch": batch | {"estimator": estimator, "delta": 2.0}}
    tree["train"], tree["lr"] = {"epochs": 2}, {"base": 0.01}
    train(tree, 2, tmp_path / "two")
    first, *later = plan(tmp_path / "two")
    assert first["batch_global"] == 16
    assert later[0]["samples"] == 1438  # the end of the first epoch
    assert later[0]["batch_global"] > 16
    if estimator == "oracle":
        train(tree, 1, tmp_path / "one")
        assert plan(tmp_path / "one")[1]["batch_global"] == later[0]["batch_global"]


def test_the_norm_test_by_single_steps_resumes_bitwise(tmp_path):
    """It looks at the last measured step alone, which is part of a checkpoint."""
    batch = {"kind": "normtest", "variant": "ddp", "eta": 0.3, "batch_global": 16}
    tree = TREE | {"batch": batch | {"batch_max": 96, "check_every": 10, "measure": "on"}}
    train(tree, 2, tmp_path / "whole")
    assert len({line["batch_global"] for line in plan(tmp_path / "whole")}) > 1
    train(tree | {"train": {"steps": 20}}, 2, tmp_path / "parts")
    train(tree, 2, tmp_path / "parts", resume="auto")
    assert plan(tmp_path / "parts") == plan(tmp_path / "whole")
    assert parameters(tmp_path / "parts") == parameters(tmp_path / "whole")
