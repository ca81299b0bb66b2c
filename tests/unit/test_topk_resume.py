"""Runs with top-k exchange stop and go on: bit by bit, or with everything that waits conserved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpctrain.api import run_on
from hpctrain.assemble import Options, World, open_session
from hpctrain.config import from_mapping
from hpctrain.errors import ConfigError
from hpctrain.runs.restore import pieces_of
from hpctrain.transport.threads import RankError, run_threads
from tests.golden_run import MLP, step_losses

TOPK = {"kind": "topk", "density": 0.05, "dense_below": 200, "bucket_mib": 0.003}
RULE = {"kind": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "clip_norm": 1.0}
FOUR = [0, 1, 2, 3]


def tree(steps: int, **exchange: Any) -> dict[str, Any]:
    return MLP | {
        "model": {"kind": "mlp", "widths": [24, 16]},
        "optimiser": RULE,
        "exchange": TOPK | exchange,
        "train": {"steps": steps},
        "lr": {"base": 0.1},
    }


def train(tree: dict[str, Any], node_of: list[int], folder: Path, resume: str = "never") -> None:
    loaded = from_mapping(tree)

    def rank_program(comm):
        return run_on(World(comm), loaded, Options(out=folder, resume=resume))

    for outcome in run_threads(len(node_of), rank_program, node_of=node_of):
        assert outcome.complete


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoints/step-{step:08d}"


def written(folder: Path, step: int, name: str) -> np.ndarray:
    """The sum over all ranks of a tensor of pieces, read from the files of a checkpoint."""
    total = np.zeros(0)
    for path in sorted(checkpoint(folder, step).glob("rank-*.json")):
        entry = json.loads(path.read_bytes())["tensors"].get(f"exchange/{name}")
        if entry is not None:
            values = load_file(path.with_suffix(".safetensors"))[f"exchange/{name}"]
            total = added(total, pieces_of(entry), values)
    return total


def loaded(tree: dict[str, Any], node_of: list[int], folder: Path, name: str) -> np.ndarray:
    """The same of what the exchanges hold after the checkpoint was taken back."""
    config = from_mapping(tree)

    def rank_program(comm):
        with open_session(config, World(comm), Options(out=folder, resume="auto")) as session:
            placed = session.exchange.state().tensors.get(name)
            return None if placed is None else (placed.pieces, placed.tensor.clone())

    total = np.zeros(0)
    for found in run_threads(len(node_of), rank_program, node_of=node_of):
        if found is not None:
            total = added(total, *found)
    return total


def added(total: np.ndarray, pieces: Any, values: torch.Tensor) -> np.ndarray:
    where = np.concatenate([np.empty(0, int), *(s.indices().numpy() for s in pieces.spans)])
    assert len(where) == len(values)
    length = max(len(total), int(where.max(initial=-1)) + 1)
    total = np.pad(total, (0, length - len(total)))
    np.add.at(total, where, values.numpy().astype(np.float64))
    return total


def assert_equal_sums(found: np.ndarray, expected: np.ndarray) -> None:
    length = max(len(found), len(expected))
    found, expected = (np.pad(v, (0, length - len(v))) for v in (found, expected))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def assert_equal_checkpoints(first: Path, second: Path, step: int) -> None:
    names = {path.name for path in checkpoint(first, step).glob("*.safetensors")}
    assert names == {path.name for path in checkpoint(second, step).glob("*.safetensors")}
    for name in names:
        one, other = (load_file(checkpoint(folder, step) / name) for folder in (first, second))
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].numpy().tobytes() == other[key].numpy().tobytes(), (name, key)


@pytest.mark.parametrize(
    ("exchange", "node_of"),
    [
        ({"algorithm": "gather"}, [0, 0, 1, 1]),
        ({"algorithm": "exclusive", "values": "bfloat16"}, FOUR),
        ({"algorithm": "exclusive"}, [0, 1, 2, 0]),
        ({"algorithm": "owner"}, [0, 1, 1, 0]),
        ({"algorithm": "owner", "values": "sign"}, FOUR),
        ({"algorithm": "gather", "warmup_steps": 6}, [0, 1]),
        ({"algorithm": "owner", "gives": "gradient", "hierarchy": False}, [0, 0, 1]),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_same_bit_by_bit(exchange, node_of, tmp_path):
    train(tree(9, **exchange), node_of, tmp_path / "whole")
    train(tree(4, **exchange), node_of, tmp_path / "parts")
    train(tree(9, **exchange), node_of, tmp_path / "parts", resume="auto")
    assert step_losses(tmp_path / "parts") == step_losses(tmp_path / "whole")
    assert_equal_checkpoints(tmp_path / "parts", tmp_path / "whole", 9)


ANY = ("gather", "exclusive", "owner")
CHANGES = [
    *((name, FOUR, name, [0, 1], {}) for name in ANY),
    *((name, FOUR, name, [0, 1, 2], {}) for name in ANY),
    ("owner", FOUR, "owner", [0, 0, 1, 1], {}),
    ("owner", [0, 0, 1, 1], "owner", FOUR, {}),
    ("owner", [0, 1, 1, 0], "owner", [0, 0, 1, 1], {}),
    ("owner", [0, 0, 1], "gather", [0, 1, 2, 0, 1], {}),
    ("owner", FOUR, "owner", FOUR, {"bucket_mib": 1.0}),
    ("gather", FOUR, "gather", FOUR, {"bucket_mib": 1.0, "index": "uint32"}),
    ("owner", [0, 0, 1, 1], "exclusive", [0, 0, 1, 1], {"hierarchy": False}),
    ("gather", FOUR, "owner", FOUR, {"density": 0.2}),
    ("exclusive", FOUR, "gather", FOUR, {}),
    ("owner", FOUR, "owner", [0, 0], {}),
    ("gather", FOUR, "gather", [0], {}),
    ("gather", [0, 1], "gather", [0, 1], {"density": 1.0}),
]


@pytest.mark.parametrize(("first", "before", "second", "after", "keys"), CHANGES, ids=str)
def test_what_waits_is_conserved(first, before, second, after, keys, tmp_path):
    train(tree(4, algorithm=first), before, tmp_path)
    again = tree(6, algorithm=second, **keys)
    for name in ("residual", "velocity"):
        assert_equal_sums(loaded(again, after, tmp_path, name), written(tmp_path, 4, name))
    if first == "owner":
        train(again, after, tmp_path, resume="auto")
        assert np.isfinite(step_losses(tmp_path)).all()


TWO_EACH = [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("nodes", "before", "after", "share"),
    [
        (2, TWO_EACH, FOUR, 1.0),
        (2, FOUR, [0, 0, 1, 2, 2, 3], 1.0),
        (2, FOUR, [0, 1], 0.5),
        (2, TWO_EACH, [0, 1, 1], 0.5),
        (4, FOUR, TWO_EACH, 1.0),
    ],
)
def test_what_waits_in_replicas_keeps_its_mean_over_them(nodes, before, after, share, tmp_path):
    """Groups of nodes are the replicas; a new one starts at the mean of the old ones."""
    groups = {"topology": {"groups": f"nodes:{nodes}"}, "sync": [{"kind": "leader", "every": 3}]}
    start = tree(4, scope="group", algorithm="gather") | groups
    train(start, before, tmp_path)
    again = start | {"train": {"steps": 6}}
    for name in ("residual", "velocity"):
        expected = share * written(tmp_path, 4, name)
        assert_equal_sums(loaded(again, after, tmp_path, name), expected)


def test_the_same_ranks_in_one_group_instead_of_two(tmp_path):
    groups = {"topology": {"groups": "nodes:2"}, "sync": [{"kind": "leader", "every": 3}]}
    start = tree(4, scope="group", algorithm="gather") | groups
    train(start, FOUR, tmp_path)
    again = start | {"topology": {"groups": "nodes:4"}, "train": {"steps": 6}}
    expected = 0.5 * written(tmp_path, 4, "residual")
    assert_equal_sums(loaded(again, FOUR, tmp_path, "residual"), expected)


def refused(tree: dict[str, Any], node_of: list[int], folder: Path) -> str:
    with pytest.raises(RankError) as caught:
        train(tree, node_of, folder, resume="auto")
    assert isinstance(caught.value.__cause__, ConfigError), repr(caught.value.__cause__)
    assert caught.value.__cause__.exit_code == 78
    return str(caught.value.__cause__)


PLAIN = {"kind": "sgd"}


@pytest.mark.parametrize(
    ("first", "second", "optimiser"),
    [
        ({"kind": "dense"}, TOPK, RULE),
        ({"kind": "dense"}, TOPK, PLAIN),
        (TOPK, {"kind": "dense"}, RULE),
        (TOPK, {"kind": "dense"}, PLAIN),
        ({"kind": "powersgd"}, TOPK, PLAIN),
        (TOPK, {"kind": "powersgd"}, PLAIN),
        ({"kind": "quantise"}, TOPK, PLAIN),
        (TOPK, {"kind": "quantise"}, PLAIN),
        (TOPK, TOPK | {"gives": "gradient"}, RULE),
        (TOPK, TOPK | {"gives": "gradient"}, PLAIN),
        (TOPK | {"gives": "gradient"}, TOPK, RULE),
        (TOPK | {"gives": "gradient"}, TOPK, PLAIN),
        (TOPK, TOPK | {"dense_below": 10**6}, PLAIN),
    ],
)
def test_another_kind_of_exchange_is_refused_clearly(first, second, optimiser, tmp_path):
    start = tree(2) | {"exchange": first, "optimiser": optimiser}
    train(start, [0, 1], tmp_path)
    message = refused(start | {"exchange": second, "train": {"steps": 4}}, [0, 1], tmp_path)
    assert "[exchange]" in message or "[optimiser]" in message


def test_another_order_of_parameters_is_refused_clearly(tmp_path):
    train(tree(4), [0, 1], tmp_path)
    other = tree(8) | {"model": {"kind": "mlp", "widths": [24, 16, 16]}}
    assert "Resume with the [model]" in refused(other, [0, 1], tmp_path)


def test_fewer_samples_than_ranks(tmp_path):
    """A rank without samples works on its part of the others' gradients with the step's lr."""
    small = {"batch": {"batch_global": 3}, "lr": {"base": 0.05}}
    losses = {}
    for size in (1, 4):
        config = tree(8, density=1.0) | small | {"optimiser": RULE | {"clip_norm": None}}
        del config["optimiser"]["clip_norm"]
        train(config, [0] * size if size == 1 else [0, 0, 1, 1], tmp_path / str(size))
        losses[size] = step_losses(tmp_path / str(size))
    assert losses[4] == pytest.approx(losses[1], rel=1e-4)
