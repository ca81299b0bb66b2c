"""Checkpoints: bitwise round trip, resize rules, the protocol between ranks, faults, kills."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from hpctrain.errors import DataError, WriteError
from hpctrain.runs import checkpoint, manifest, snapshot
from hpctrain.runs.checkpoint import CheckpointConfig, Checkpointer
from hpctrain.runs.restore import load
from hpctrain.runs.snapshot import HostCopy, decode, encode
from hpctrain.state import Placed, State, shard_bounds

SHARDED = 11


class Ranks:
    """Ranks as threads with a blocking maximum, no more."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=30)
        self._slots = [np.zeros(0)] * size

    def reduce_max(self, rank: int) -> Callable[[np.ndarray], None]:
        def reduce(vector: np.ndarray) -> None:
            self._slots[rank] = vector.copy()
            self._barrier.wait()
            vector[:] = np.max(self._slots, axis=0)
            self._barrier.wait()

        return reduce

    def run(self, function: Callable[[int], object]) -> list:
        results: list = [None] * self.size

        def call(rank: int) -> None:
            try:
                results[rank] = function(rank)
            except BaseException as error:
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        return results


def whole(step: int) -> torch.Tensor:
    return torch.arange(SHARDED, dtype=torch.float32) + 100 * step


def parts_of(rank: int, size: int, step: int) -> dict[str, State]:
    start, end = shard_bounds(SHARDED, rank, size)
    weight = torch.arange(6, dtype=torch.float64).reshape(2, 3) + step
    residual = torch.full((4,), float(rank + 1) + step, dtype=torch.float32)
    model = State({"weight": Placed(weight)}, {"step": step, "lr": 0.1 / 3})
    exchange = State(
        {
            "residual": Placed(residual, "per_rank", "sum"),
            "velocity": Placed(residual * 2, "per_rank", "mean"),
            "random": Placed(torch.tensor([rank, step], dtype=torch.uint8), "per_rank", "reset"),
            "moment": Placed(whole(step)[start:end], "shard"),
        }
    )
    return {"model": model, "exchange": exchange}


def write(folder: Path, size: int, steps: list[int], **options) -> list:
    """All ranks save each of `steps`, waiting for each; the last outcome per rank."""
    config = CheckpointConfig(**options)
    ranks = Ranks(size)

    def rank_main(rank: int):
        saver = Checkpointer(folder, config, rank=rank, size=size, attempt=1)
        for step in steps:
            saver.save(step, parts_of(rank, size, step))
            outcome = saver.drain(ranks.reduce_max(rank))
        return outcome

    return ranks.run(rank_main)


def single(folder: Path, **options) -> Checkpointer:
    return Checkpointer(folder, CheckpointConfig(**options), rank=0, size=1, attempt=1)


def alone(vector: np.ndarray) -> None:
    """The maximum over one rank."""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def test_every_dtype_and_shape_comes_back_bitwise(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "float32": torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-42]),
        "float64": torch.randn(3, 2, dtype=torch.float64),
        "float16": torch.randn(7).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "int64": torch.tensor([2**63 - 1, -(2**63)]),
        "int32": torch.tensor([[1], [-1]], dtype=torch.int32),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "zero_dimensional": torch.tensor(3.25),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 3).t(),
        "expanded": torch.randn(1, 3).expand(5, 3),
        "strided": torch.arange(10)[::3],
        "a/b c": torch.ones(1),
    }
    shared = torch.arange(4.0)
    tensors |= {"tied_one": shared, "tied_two": shared}
    counters = {
        "int": 2**60 + 1, "float": 0.1 + 0.2, "one": 1.0, "nan": float("nan"), "inf": -float("inf"),
        "text": "ä\n", "yes": True, "none": None,
    }  # fmt: skip
    saver = single(tmp_path)
    parts = {"all": State({k: Placed(t) for k, t in tensors.items()}, counters), "bare": State()}
    saver.save(3, parts)
    assert saver.drain(alone).ok
    loaded = load(manifest.latest(tmp_path).path, 0, 1)
    assert set(loaded) == {"all", "bare"}
    assert set(loaded["all"].tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert same(loaded["all"].tensors[name].tensor, tensor), name
    for name, value in counters.items():
        back = loaded["all"].counters[name]
        assert type(back) is type(value)
        assert back == value or name == "nan"
    assert np.isnan(loaded["all"].counters["nan"])


def test_snapshot_does_not_change_with_the_training(tmp_path, monkeypatch):
    go = threading.Event()
    real = snapshot.save_file
    monkeypatch.setattr(snapshot, "save_file", lambda *a: (go.wait(10), real(*a)))
    weight = torch.ones(1000)
    saver = single(tmp_path)
    stall_s = saver.save(1, {"m": State({"w": Placed(weight)})})
    weight.zero_()
    go.set()
    outcome = saver.drain(alone)
    assert outcome.stall_s == stall_s >= 0
    assert outcome.save_s >= stall_s
    assert load(tmp_path / "step-00000001", 0, 1)["m"].tensors["w"].tensor.sum() == 1000


def test_host_memory_is_reused_from_save_to_save():
    copy = HostCopy(0, 1)
    weight = torch.ones(10)
    first = copy.take(1, {"m": State({"w": Placed(weight)})}).replicated["m/w"]
    second = copy.take(2, {"m": State({"w": Placed(weight + 1)})}).replicated["m/w"]
    assert first.data_ptr() == second.data_ptr() != weight.data_ptr()


def test_reserve_allocates_before_the_first_save(tmp_path):
    saver = single(tmp_path)
    saver.reserve(parts_of(0, 1, 1))
    reserved = {key: t.data_ptr() for key, t in saver._host._buffers.items()}
    saver.save(1, parts_of(0, 1, 1))
    assert saver.drain(alone).ok
    assert {key: t.data_ptr() for key, t in saver._host._buffers.items()} == reserved


def test_files_of_a_checkpoint(tmp_path):
    write(tmp_path, 2, [7])
    names = sorted(path.name for path in (tmp_path / "step-00000007").iterdir())
    assert names == [
        "manifest.json", "rank-00000.json", "rank-00000.safetensors", "rank-00001.json",
        "rank-00001.safetensors", "replicated.safetensors", "state.json",
    ]  # fmt: skip
    state = json.loads((tmp_path / "step-00000007/state.json").read_text())
    assert (state["step"], state["size"]) == (7, 2)
    assert state["parts"]["model"]["tensors"]["weight"] == {
        "placement": "replicated", "resize": "keep", "dtype": "float64", "shape": [2, 3]
    }  # fmt: skip
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "step-00000007").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_same_number_of_ranks_is_bitwise(tmp_path, size):
    assert all(outcome.ok for outcome in write(tmp_path, size, [5]))
    found = manifest.latest(tmp_path)
    assert (found.step, found.size, found.refused) == (5, size, ())
    for rank in range(size):
        loaded = load(found.path, rank, size)
        for part, state in parts_of(rank, size, 5).items():
            assert loaded[part].counters == state.counters
            assert loaded[part].tensors.keys() == state.tensors.keys()
            for name, placed in state.tensors.items():
                back = loaded[part].tensors[name]
                assert same(back.tensor, placed.tensor)
                assert (back.placement, back.resize) == (placed.placement, placed.resize)


def test_four_to_two_to_three_ranks(tmp_path):
    write(tmp_path / "four", 4, [5])
    path = manifest.latest(tmp_path / "four").path
    two = [load(path, rank, 2) for rank in range(2)]
    residuals = [state["exchange"].tensors["residual"].tensor for state in two]
    # step + 1, 2, 3, 4 on four ranks: rank 0 takes old 0 and 2, rank 1 takes old 1 and 3
    assert residuals[0].tolist() == [6.0 + 8.0] * 4
    assert residuals[1].tolist() == [7.0 + 9.0] * 4
    for state in two:
        assert state["exchange"].tensors["velocity"].tensor.tolist() == [15.0] * 4
        assert "random" not in state["exchange"].tensors
        assert same(
            state["model"].tensors["weight"].tensor,
            parts_of(0, 1, 5)["model"].tensors["weight"].tensor,
        )
        assert state["model"].counters == {"step": 5, "lr": 0.1 / 3}
    moments = [state["exchange"].tensors["moment"].tensor for state in two]
    assert [len(m) for m in moments] == [6, 5]
    assert same(torch.cat(moments), whole(5))

    ranks = Ranks(2)

    def save_again(rank: int):
        saver = Checkpointer(tmp_path / "two", CheckpointConfig(), rank=rank, size=2, attempt=1)
        saver.save(6, two[rank])
        return saver.drain(ranks.reduce_max(rank)).ok

    assert ranks.run(save_again) == [True, True]
    path = manifest.latest(tmp_path / "two").path
    three = [load(path, rank, 3)["exchange"].tensors for rank in range(3)]
    total = sum(tensors["residual"].tensor.double() for tensors in three)
    assert total.tolist() == [6.0 + 7 + 8 + 9] * 4
    assert three[2]["residual"].tensor.tolist() == [0.0] * 4
    assert same(torch.cat([tensors["moment"].tensor for tensors in three]), whole(5))
    assert [len(tensors["moment"].tensor) for tensors in three] == [4, 4, 3]


@pytest.mark.parametrize("old", [1, 2, 3, 4])
@pytest.mark.parametrize("new", [1, 2, 3, 5, 12])
def test_any_change_of_ranks_conserves_sum_and_shards(tmp_path, old, new):
    write(tmp_path, old, [1])
    path = manifest.latest(tmp_path).path
    states = [load(path, rank, new)["exchange"].tensors for rank in range(new)]
    residual = sum(state["residual"].tensor for state in states)
    assert residual.tolist() == [float(sum(rank + 2 for rank in range(old)))] * 4
    assert same(torch.cat([state["moment"].tensor for state in states]), whole(1))


def test_sum_of_different_shapes_says_what_to_do(tmp_path):
    ranks = Ranks(2)

    def save(rank: int):
        saver = Checkpointer(tmp_path, CheckpointConfig(), rank=rank, size=2, attempt=1)
        saver.save(1, {"p": State({"t": Placed(torch.ones(rank + 1), "per_rank", "sum")})})
        return saver.drain(ranks.reduce_max(rank)).ok

    assert ranks.run(save) == [True, True]
    path = manifest.latest(tmp_path).path
    assert len(load(path, 1, 2)["p"].tensors["t"].tensor) == 2
    with pytest.raises(DataError, match="p/t differs in shape.*Resume at 2 ranks"):
        load(path, 0, 1)


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        (Placed(torch.ones(2), "replicated", "sum"), "takes keep or reset"),
        (Placed(torch.ones(2, 2), "shard"), "1-D piece"),
        (Placed(torch.ones(2, dtype=torch.bool), "per_rank", "sum"), "sum needs"),
        (Placed(torch.ones(2, dtype=torch.int64), "per_rank", "mean"), "mean needs"),
    ],
)
def test_what_could_not_be_resized_is_refused_at_save(placed, message):
    with pytest.raises(ValueError, match=message):
        HostCopy(0, 1).take(1, {"p": State({"t": placed})})


def test_counters_of_foreign_types_are_refused():
    with pytest.raises(ValueError, match="counter p/x: got a float64"):
        encode("p/x", np.float64(1.0))
    assert decode(encode("p/x", float("inf"))) == float("inf")


def test_keep_prunes_the_oldest(tmp_path):
    write(tmp_path, 2, [1, 2, 3, 4], keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000003", "step-00000004"]


def test_saving_a_step_again_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        saver = single(tmp_path)
        saver.save(9, {"m": State({"w": Placed(torch.full((3,), value))})})
        assert saver.drain(alone).ok
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]
    assert load(tmp_path / "step-00000009", 0, 1)["m"].tensors["w"].tensor.tolist() == [2.0] * 3


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped tensor byte": (
        lambda f: flip_last_byte(f / "replicated.safetensors"),
        "replicated.safetensors: is damaged",
    ),
    "flipped state": (lambda f: flip_last_byte(f / "state.json"), "state.json: is damaged"),
    "flipped rank file": (lambda f: flip_last_byte(f / "rank-00001.json"), "rank-00001.json"),
    "flipped manifest": (
        lambda f: flip_last_byte(f / "manifest.json"),
        "manifest.json: is damaged",
    ),
    "truncated": (
        lambda f: os.truncate(f / "rank-00001.safetensors", 20),
        "rank-00001.safetensors: has 20 bytes; the manifest says",
    ),
    "missing tensor file": (
        lambda f: (f / "rank-00000.safetensors").unlink(),
        "rank-00000.safetensors: is missing",
    ),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: is missing"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[1]"), "is damaged"),
    "deeply nested manifest": (
        lambda f: (f / "manifest.json").write_text("[" * 100_000),
        "is damaged",
    ),
    "foreign file": (
        lambda f: (f / "notes.txt").write_text("x"),
        "notes.txt: is not in the manifest",
    ),
    "foreign folder": (lambda f: (f / "more").mkdir(), "more: is not in the manifest"),
    "symbolic link": (
        lambda f: (
            (f / "state.json").rename(f.parent / "elsewhere"),
            (f / "state.json").symlink_to(f.parent / "elsewhere"),
        ),
        "state.json: is missing or not a plain file",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_reported_and_the_older_one_is_used(tmp_path, case):
    damage, message = DAMAGE[case]
    write(tmp_path, 2, [1, 2])
    damage(tmp_path / "step-00000002")
    found = manifest.latest(tmp_path)
    assert found.step == 1
    assert [refusal.name for refusal in found.refused] == ["step-00000002"]
    assert message in found.refused[0].reason
    assert same(load(found.path, 1, 2)["exchange"].tensors["moment"].tensor, whole(1)[6:])


def test_every_byte_of_every_file_is_protected(tmp_path):
    write(tmp_path, 1, [1])
    folder = tmp_path / "step-00000001"
    for path in folder.iterdir():
        good = path.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 25)):
            bad = bytearray(good)
            bad[position] ^= 0x10
            if path.name == "manifest.json" and bytes(bad).split() == good.split():
                continue
            path.write_bytes(bad)
            with pytest.raises(DataError):
                manifest.verify(folder)
        path.write_bytes(good)
    manifest.verify(folder)


def test_all_bad_is_an_error_not_a_fresh_start(tmp_path):
    write(tmp_path, 1, [1, 2])
    for name in ("step-00000001", "step-00000002"):
        (tmp_path / name / "state.json").unlink()
    with pytest.raises(DataError, match=r"none of its 2 checkpoints(.|\n)*state.json: is missing"):
        manifest.latest(tmp_path)
    assert manifest.latest(tmp_path / "absent") is None


def test_a_manifest_cannot_name_files_outside(tmp_path):
    write(tmp_path, 1, [1])
    folder = tmp_path / "step-00000001"
    (tmp_path / "secret.json").write_text("{}")
    content = json.loads((folder / "manifest.json").read_text())
    files = content["files"] | {"../secret.json": manifest.fingerprint(tmp_path / "secret.json")}
    manifest.write_manifest(folder, 1, 1, files)
    with pytest.raises(DataError, match="no part of the format"):
        manifest.verify(folder)


class Malice:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("name", ["model.pt", "rank-00000.safetensors", "state.json", "extra.pkl"])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path, name):
    write(tmp_path / "run", 1, [1, 2])
    target = tmp_path / "pwned"
    pickled = pickle.dumps(Malice(str(target)))
    folder = tmp_path / "run" / "step-00000002"
    (folder / name).write_bytes(pickled)
    found = manifest.latest(tmp_path / "run")
    load(found.path, 0, 1)
    assert found.step == 1
    if name.endswith(("pt", "pkl")):
        assert "looks like a pickle" in found.refused[0].reason
    # Even with a manifest that vouches for it, nothing runs it.
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files[name] = manifest.fingerprint(folder / name)
    manifest.write_manifest(folder, 2, 1, files)
    # It may be refused again or fail to parse; what matters is what does not happen.
    with contextlib.suppress(DataError, ValueError, SafetensorError):
        load(manifest.latest(tmp_path / "run").path, 0, 1)
    assert not target.exists()
    pickle.loads(pickled)
    assert target.exists(), "the pickle was harmless, so this test proved nothing"


def test_a_failing_rank_discards_on_all_and_keeps_the_old_one(tmp_path, monkeypatch):
    write(tmp_path, 3, [1])
    real = checkpoint.write_files

    def full_disk(taken, folder):
        if taken.rank == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(taken, folder)

    monkeypatch.setattr(checkpoint, "write_files", full_disk)
    outcomes = write(tmp_path, 3, [2])
    assert [outcome.ok for outcome in outcomes] == [False] * 3
    assert {outcome.reason for outcome in outcomes} == {"rank 2: No space left on device"}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.setattr(checkpoint, "write_files", real)
    assert all(outcome.ok for outcome in write(tmp_path, 3, [2]))
    assert manifest.latest(tmp_path).step == 2


def test_a_failing_commit_discards(tmp_path, monkeypatch):
    write(tmp_path, 2, [1])

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(manifest, "write_manifest", refuse)
    outcomes = write(tmp_path, 2, [2])
    assert {outcome.reason for outcome in outcomes} == {"rank 0: Permission denied"}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_on_error_stop_raises_on_all_ranks_alike(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    ranks = Ranks(2)

    def rank_main(rank: int):
        config = CheckpointConfig(on_error="stop")
        saver = Checkpointer(blocked / "deeper", config, rank=rank, size=2, attempt=1)
        saver.save(4, parts_of(rank, 2, 4))
        reduce = ranks.reduce_max(rank)
        for _ in range(5000):
            vector = np.array(saver.numbers())
            reduce(vector)
            saver.advance(vector.tolist())
        return "went on"

    errors = ranks.run(rank_main)
    assert [type(error) for error in errors] == [WriteError] * 2
    assert str(errors[0]) == str(errors[1])
    assert "step 4" in str(errors[0])
    assert "Not a directory" in str(errors[0])
    assert errors[0].exit_code == 73


def test_polled_protocol_with_late_numbers(tmp_path):
    """The control all-reduce brings numbers a step late; no rank may decide on stale ones."""
    ranks = Ranks(3)
    config = CheckpointConfig(every_steps=5, keep=100)

    def rank_main(rank: int):
        saver = Checkpointer(tmp_path, config, rank=rank, size=3, attempt=1)
        reduce = ranks.reduce_max(rank)
        late = None
        events, step = [], 0
        while step < 60 or saver.phase != "idle":
            step += 1
            posted = np.array(saver.numbers())
            if late is not None:
                outcome = saver.advance(late)
                if outcome:
                    events.append((step, "ok" if outcome.ok else "failed", outcome.step))
            if step <= 60 and saver.due(step):
                events.append((step, "save", step))
                saver.save(step, parts_of(rank, 3, step))
            reduce(posted)
            late = posted.tolist()
        return events

    events = ranks.run(rank_main)
    assert events[0] == events[1] == events[2]
    saved = [step for _, what, step in events[0] if what == "save"]
    done = [step for _, what, step in events[0] if what == "ok"]
    assert saved
    assert saved == done == sorted(set(saved))
    for step in done:
        found = manifest.verify(tmp_path / manifest.folder_name(step))
        tensors = load(found.path, 1, 3)["exchange"].tensors
        assert tensors["random"].tensor.tolist() == [1, step]


def test_due_by_steps_waits_for_the_save_under_way(tmp_path, monkeypatch):
    go = threading.Event()
    real = checkpoint.write_files
    monkeypatch.setattr(checkpoint, "write_files", lambda *a: (go.wait(10), real(*a)))
    saver = single(tmp_path, every_steps=2)
    assert [saver.due(step) for step in (1, 2)] == [False, True]
    saver.save(2, parts_of(0, 1, 2))
    assert [saver.due(step) for step in (3, 4, 5)] == [False, False, False]
    go.set()
    saver.drain(alone)
    assert saver.due(7)  # overdue since step 4
    saver.save(7, parts_of(0, 1, 7))
    saver.drain(alone)
    assert not saver.due(7)


def test_due_by_seconds_is_rank_0s_clock_and_asks_once(tmp_path):
    now = [0.0]
    savers = [
        Checkpointer(
            tmp_path, CheckpointConfig(every_s=10.0), rank=rank, size=2, attempt=1,
            clock=lambda: now[0],
        )
        for rank in range(2)
    ]  # fmt: skip

    def step_all(stale: list[float] | None = None) -> list[bool]:
        reduced = stale or np.max([saver.numbers() for saver in savers], axis=0).tolist()
        for saver in savers:
            saver.advance(reduced)
        return [saver.due(1) for saver in savers]

    assert step_all() == [False, False]
    now[0] = 11.0
    stale = np.max([saver.numbers() for saver in savers], axis=0).tolist()
    assert step_all() == [True, True]
    for rank, saver in enumerate(savers):
        saver.save(1, parts_of(rank, 2, 1))
    while any(saver.phase != "idle" for saver in savers):
        step_all()
    assert step_all(stale) == [False, False]
    assert step_all() == [False, False]


@pytest.mark.parametrize(("stopped", "at_end", "saved"), [
    (True, False, True), (False, True, True), (False, False, False),
])  # fmt: skip
def test_finish(tmp_path, stopped, at_end, saved):
    saver = single(tmp_path, at_end=at_end)
    saver.save(3, parts_of(0, 1, 3))
    outcome = saver.finish(5, parts_of(0, 1, 5), alone, stopped=stopped)
    assert outcome.ok
    assert saver.phase == "idle"
    assert manifest.latest(tmp_path).step == (5 if saved else 3)
    again = saver.finish(saver.saved_step, parts_of(0, 1, 5), alone, stopped=True)
    assert again is None, "a step that is on disk is not saved twice"


def test_finish_never_promises_a_checkpoint_it_has_not(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(checkpoint, "write_files", refuse)
    with pytest.raises(WriteError, match=r"step 5.*quota exceeded.*no checkpoint"):
        single(tmp_path).finish(5, parts_of(0, 1, 5), alone, stopped=True)
    outcome = single(tmp_path).finish(5, parts_of(0, 1, 5), alone, stopped=False)
    assert not outcome.ok


def test_leftovers_of_dead_attempts_are_removed(tmp_path):
    write(tmp_path, 1, [1])
    for name in ("step-00000002.tmp-1", "step-00000001.del-3", "step-00000001.old-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    assert len(manifest.clean(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "step-00000001"]


def test_a_replaced_checkpoint_counts_until_its_successor_is_there(tmp_path):
    write(tmp_path, 1, [4])
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000004.old-2")
    assert manifest.clean(tmp_path) == []
    assert manifest.latest(tmp_path).step == 4


def test_refused_checkpoints_neither_count_nor_go(tmp_path):
    write(tmp_path, 1, [1, 2, 3], keep=5)
    (tmp_path / "step-00000003" / "state.json").unlink()
    found = manifest.latest(tmp_path)
    saver = Checkpointer(
        tmp_path, CheckpointConfig(keep=1), rank=0, size=1, attempt=2, saved_step=2,
        refused=[refusal.name for refusal in found.refused],
    )  # fmt: skip
    saver.save(4, parts_of(0, 1, 4))
    assert saver.drain(alone).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def run_python(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    root = Path(checkpoint.__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=150, env=os.environ | {"PYTHONPATH": str(root)},
        **options,
    )  # fmt: skip


SAVER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from hpctrain.runs import manifest
from hpctrain.runs.checkpoint import CheckpointConfig, Checkpointer
from hpctrain.runs.restore import load
from hpctrain.state import Placed, State

torch.set_num_threads(1)

def parts(step):
    tensor = torch.arange(20000, dtype=torch.float64) * step
    own = Placed(tensor[:100], "per_rank", "sum")
    return {"m": State({"w": Placed(tensor), "r": own}, {"step": step})}

def saver(folder, attempt, **options):
    return Checkpointer(folder, CheckpointConfig(**options), rank=0, size=1, attempt=attempt)

def check(folder, attempt):
    found = manifest.latest(folder)
    assert found is None or not found.refused, found.refused
    manifest.clean(folder)
    for path in manifest.checkpoints(folder):
        manifest.verify(path)  # the older ones too: none half deleted
    if found is None:
        return 0
    back = load(found.path, 0, 1)["m"]
    assert back.counters["step"] == found.step
    assert torch.equal(back.tensors["w"].tensor, parts(found.step)["m"].tensors["w"].tensor)
    return found.step
"""


def test_killed_at_any_moment_the_newest_good_one_loads(tmp_path):
    """SIGKILL at random moments of an endless series of saves; nothing good is ever lost."""
    done = run_python(
        SAVER
        + """
folder = Path(sys.argv[1])
random.seed(1)
last = kills = kills_within = attempt = 0
wait_s = 0.02
while kills < 40 or kills_within < 10 or last < 5:
    attempt += 1
    assert attempt < 1000, (kills, kills_within, last)
    child = os.fork()
    if child == 0:
        one = saver(folder, attempt, keep=2)
        for step in range(last + 1, last + 10000):
            one.save(step, parts(step))
            outcome = one.drain(lambda v: None)
            assert outcome.ok, outcome
        os._exit(0)
    time.sleep(random.uniform(0, wait_s))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    kills_within += any(".tmp-" in path.name for path in folder.glob("*"))
    now = check(folder, attempt)
    assert now >= last, (now, last)
    assert [p.name for p in folder.glob("*.*")] == []
    wait_s *= 1.3 if now == last else 0.9  # whatever the speed: some kills early, some late
    last = now
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_killed_before_every_single_file_operation(tmp_path):
    """The same, exhaustively: SIGKILL at the n-th file operation of a save, for every n."""
    done = run_python(
        SAVER
        + """
base = Path(sys.argv[1])
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"}
n = kills = 0
for step in (1, 2):
    one = saver(base / "0", 1, keep=2)
    one.save(step, parts(step))
    assert one.drain(lambda v: None).ok
while True:
    n += 1
    folder = base / str(n)
    shutil.copytree(base / "0", folder)
    child = os.fork()
    if child == 0:
        left = [n]
        def count(event, arguments):
            if event in EVENTS:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        one = saver(folder, 2, keep=2)
        # Step 2 again: the path that replaces a checkpoint, and prunes none; then 3, which prunes.
        for step in (2, 3):
            one.save(step, parts(step))
            assert one.drain(lambda v: None).ok
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert check(folder, 3) in (2, 3)
    shutil.rmtree(folder)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    kills += 1
print(kills)
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


@pytest.mark.parametrize("limit", [100, 40_000, 150_000])
def test_a_real_error_of_the_system_leaves_the_old_one(tmp_path, limit):
    """A file size limit makes the system itself fail writes half-way, as a full disk does."""
    done = run_python(
        SAVER
        + """
import resource
folder = Path(sys.argv[1])
one = saver(folder, 1)
one.save(1, parts(1))
assert one.drain(lambda v: None).ok
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
one.save(2, parts(2))
outcome = one.drain(lambda v: None)
assert not outcome.ok
print(outcome.reason)
assert [p.name for p in folder.iterdir()] == ["step-00000001"]
assert check(folder, 1) == 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
one.save(3, parts(3))
assert one.drain(lambda v: None).ok and check(folder, 1) == 3
""",
        tmp_path,
        limit,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "rank 0: File too large"
