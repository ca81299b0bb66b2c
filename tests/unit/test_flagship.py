"""configs/flagship.toml on the digits: every axis at once, stopped, resumed, repeated."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpctrain.assemble import Options, World, open_session
from hpctrain.batch import StepTimes
from hpctrain.config import Loaded, load
from hpctrain.runs import manifest
from hpctrain.train import run_training
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import run_threads
from tests.recorded import lines

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "flagship.toml"
ONE_EACH, TWO_EACH = [0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]
SMALL = (
    "data.kind=digits",
    "model.channels=[8, 16]",
    "model.hidden=64",
    "exchange.dense_below=200",
    "exchange.density=0.1",
    "sync=[{kind = 'leader', scope = 'world', every = 8, pull = 0.5}]",
    "lr.reference_batch=64",
    "lr.base=0.1",
    "lr.schedule=constant",
    "lr.warmup_samples=640",
    "evaluate.every_epochs=0",
    "record.progress=none",
)
GROWING = (
    "batch.batch_global=64",
    "batch.batch_max=256",
    "batch.batch_min=64",
    "batch.measure=on",  # "auto" measures less often where measuring is slow
)
EPOCHS = 8


@dataclass
class Ranks:
    """What one rank saw."""

    batches: list[int]
    """batch_global, step by step."""
    params_P: torch.Tensor
    replica: int


def configured(epochs: float, *batch: str) -> Loaded:
    return load(CONFIG, [*SMALL, f"train.epochs={epochs}", *(batch or GROWING)])


def train(loaded: Loaded, node_of: list[int], folder: Path, resume: str = "never") -> list[Ranks]:
    def rank(comm: Communicator) -> Ranks:
        with open_session(loaded, World(comm), Options(out=folder, resume=resume)) as session:
            session.batch.fix_times(StepTimes(fixed_s=0.05, per_sample_s=1e-4))
            decided, ask = [], session.batch.next

            def following(clock: Any) -> Any:
                found = ask(clock)
                decided.append(found.decision.batch_global)
                return found

            session.batch.next = following  # type: ignore[method-assign]
            assert run_training(session) is None
            return Ranks(decided, session.flat.params_P.clone(), session.replicas.mine)

    return run_threads(len(node_of), rank, node_of=node_of, only_waits=True)


def plan(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "batch_plan.jsonl").read_text().splitlines()]


def last_tensors(folder: Path) -> dict[str, bytes]:
    """What the last checkpoint holds of parameters, velocities, residuals and rules."""
    last = manifest.latest(folder / "checkpoints")
    assert last is not None
    return {
        f"{path.stem} {name}": tensor.numpy().tobytes()
        for path in last.path.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if name.partition("/")[0] in ("model", "exchange", "sync")
    }


def agree(found: list[Ranks]) -> None:
    """One batch for all at every step; equal parameters in a replica, other ones in the other."""
    assert all(rank.batches == found[0].batches for rank in found)
    assert {rank.replica for rank in found} == {0, 1}
    for rank in found:
        first = next(other for other in found if other.replica == rank.replica)
        assert torch.equal(rank.params_P, first.params_P)
    assert not torch.equal(found[0].params_P, found[-1].params_P)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 nodes x 2 ranks that is to be continued."""
    folder = tmp_path_factory.mktemp("flagship") / "run"
    agree(train(configured(EPOCHS), TWO_EACH, folder))
    return folder


def test_noise_is_measured_and_the_batch_changes(stopped):
    decided = plan(stopped)
    assert {line["batch_global"] for line in decided} > {64}
    known = [line for line in decided if line.get("low") is not None]
    assert known
    for line in known:
        assert 1.0 <= line["low"] < 1437
        assert line["s2"] > 0.0
    changed = next(line for line in decided if line["batch_global"] != 64)
    assert changed["b_half"] > 0.0
    assert "gain" in changed["reason"]
    last = lines(stopped)[-1]
    assert 0.0 < last["density"] < 0.3
    assert last["sync"]["0_leader.leader"] in (0, 1)


def test_it_goes_on_with_half_the_ranks(stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    found = train(configured(EPOCHS + 4), ONE_EACH, folder, resume="auto")
    agree(found)
    assert found[0].batches[0] == plan(stopped)[-1]["batch_global"]
    assert lines(folder, "eval")[-1]["accuracy"] > 0.9


def test_a_replay_is_the_same_bit_by_bit_although_it_was_stopped(stopped, tmp_path):
    again = ("batch.kind=replay", f"batch.plan={stopped}", "batch.batch_global=64")
    again += ("batch.micro_batch=8",)  # what goodput takes: the share of the start batch
    # At the end of an epoch, so that the stop cuts no batch short.
    train(configured(EPOCHS - 2, *again), TWO_EACH, tmp_path / "run")
    found = train(configured(EPOCHS, *again), TWO_EACH, tmp_path / "run", resume="auto")
    agree(found)
    tensors = last_tensors(tmp_path / "run")
    assert {name.split()[1].partition("/")[0] for name in tensors} == {"model", "exchange", "sync"}
    assert tensors == last_tensors(stopped)
