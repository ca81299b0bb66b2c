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
from tests.golden_run import GOLDEN, MLP, step_losses


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
    return step_losses(folder)


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_losses_equal_the_golden_ones(comm, rank_tmp_path, backend):
    tree = MLP | {"exchange": {"dense_backend": backend, "bucket_mib": 0.002}}
    golden = json.loads(GOLDEN.read_text())["mlp"]
    losses = run(comm, tree, rank_tmp_path / "run")
    assert losses[: len(golden)] == pytest.approx(golden, rel=1e-12, abs=0)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_resume_is_bitwise_whatever_the_delays(comm, rank_tmp_path, backend):
    tree = MLP | {
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
    tree = MLP | {"train": {"steps": 10}}
    exact = run(comm, tree, rank_tmp_path / "exact")
    exchange = {"dense_backend": backend, "wire_dtype": wire}
    rounded = run(comm, tree | {"exchange": exchange}, rank_tmp_path / "rounded")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
