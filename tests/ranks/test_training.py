"""Whole runs through MPI and Horovod: golden losses, bitwise resume, delays in hooks."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hpctrain.api import run_on
from hpctrain.assemble import Options, World
from hpctrain.config import from_mapping
from hpctrain.data.spec import Spec
from hpctrain.models.mlp import Mlp

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "losses.json"
TREE: dict[str, Any] = {
    "name": "mlp",
    "seed": 7,
    "data": {"kind": "digits"},
    "model": {"kind": "mlp", "widths": [24]},
    "optimiser": {"kind": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "lr": {"base": 0.1, "schedule": "cosine", "warmup_epochs": 0.5},
    "batch": {"batch_global": 50},
    "train": {"steps": 30, "dtype": "float64"},
    "evaluate": {"every_epochs": 0},
    "record": {"every_steps": 1, "progress": "none"},
}


def jittery(spec: Spec, widths: list[int], dropout: float) -> nn.Module:
    """An MLP whose gradients become ready after random delays, different on every rank."""
    module = Mlp(widths=widths, dropout=dropout).build(spec)
    delays = random.Random(time.time_ns())
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: time.sleep(delays.random() * 0.003))
    return module


def run(comm, tree: dict[str, Any], folder: Path, resume: str = "never") -> list[float]:
    """Every step's loss, as rank 0 recorded it."""
    run_on(World(comm), from_mapping(tree), Options(out=folder, resume=resume))
    comm.barrier()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_losses_equal_the_golden_ones(comm, rank_tmp_path, backend):
    tree = TREE | {"exchange": {"dense_backend": backend, "bucket_mib": 0.002}}
    golden = json.loads(GOLDEN.read_text())["mlp"]
    losses = run(comm, tree, rank_tmp_path / "run")
    assert losses[: len(golden)] == pytest.approx(golden, rel=1e-12, abs=0)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_resume_is_bitwise_whatever_the_delays(comm, rank_tmp_path, backend):
    tree = TREE | {
        "exchange": {"dense_backend": backend, "bucket_mib": 0.002},
        "model": {"kind": f"{__name__}:jittery", "args": {"widths": [24, 16], "dropout": 0.2}},
        "lr": {"base": 0.1},
        "train": {"steps": 14},
    }
    whole = run(comm, tree, rank_tmp_path / "whole")
    run(comm, tree | {"train": {"steps": 6}}, rank_tmp_path / "parts")
    parts = run(comm, tree, rank_tmp_path / "parts", resume="auto")
    assert parts == whole
    names = ("replicated.safetensors", f"rank-{comm.rank:05d}.safetensors")
    for name in names:
        files = [rank_tmp_path / r / "checkpoints/step-00000014" / name for r in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("wire", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_half_precision_on_the_wire_stays_close(comm, rank_tmp_path, backend, wire):
    tree = TREE | {"train": {"steps": 10}}
    exact = run(comm, tree, rank_tmp_path / "exact")
    exchange = {"dense_backend": backend, "wire_dtype": wire}
    rounded = run(comm, tree | {"exchange": exchange}, rank_tmp_path / "rounded")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
