from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from data_files import load
from torch.utils.data import Dataset, TensorDataset

from hpctrain.data import CustomData
from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError, DataError


class Words(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int):
        tokens = torch.arange(row, row + 5)
        return tokens[:-1], tokens[1:]


class Pictures(Dataset):
    classes = ("cat", "dog", "cow")
    targets = [i % 3 for i in range(30)]

    def __len__(self) -> int:
        return 30

    def __getitem__(self, row: int):
        return np.full((1, 2, 2), row, np.float64), self.targets[row]


class Points(Dataset):
    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 10

    def __getitem__(self, row: int):
        return torch.full((3,), float(row)), int(row == self.bad) * 7


MAKERS = {
    "regression": lambda n=10: TensorDataset(torch.rand(n, 3), torch.rand(n)),
    "pictures": Pictures,
    "words": Words,
    "points": Points,
    "pair": lambda: (Pictures(), Points()),
    "empty": lambda: TensorDataset(torch.rand(0, 3), torch.rand(0)),
    "number": lambda: 3,
    "triples": lambda: [(1, 2, 3)] * 10,
    "texts": lambda: [("a", "b")] * 10,
    "ragged": lambda: [(torch.zeros(1 + i % 2), 0) for i in range(10)],
}


@pytest.fixture(autouse=True)
def module(monkeypatch) -> None:
    made = types.ModuleType("users_data")
    vars(made).update(MAKERS)
    monkeypatch.setitem(sys.modules, "users_data", made)


def config(name: str, **keys) -> CustomData:
    return CustomData(kind=f"users_data:{name}", **keys)


def test_classification_by_classes():
    data = load(config("pictures"))
    assert data.spec == Spec("classification", (1, 2, 2), "float32", 3)
    assert (len(data.train), len(data.test)) == (24, 6)
    inputs, targets = data.train.batch(np.arange(24), 0)
    assert inputs.dtype == torch.float32
    assert (inputs[:, 0, 0, 0].long() % 3).tolist() == targets.tolist()
    assert data.train.labels().tolist() == targets.tolist()
    held = data.test.batch(np.arange(6), 0)[0][:, 0, 0, 0]
    assert sorted([*inputs[:, 0, 0, 0].tolist(), *held.tolist()]) == list(range(30))


def test_regression_language_and_arguments():
    data = load(config("regression", args={"n": 40}))
    assert data.spec == Spec("regression", (3,), "float32", 1)
    assert data.train.batch(np.arange(4), 0)[1].shape == (4, 1)
    assert (len(data.train), data.train.labels()) == (32, None)
    data = load(config("words", n_outputs=30, limit_train=3))
    assert data.spec == Spec("language", (4,), "int64", 30)
    inputs, targets = data.train.batch(np.arange(3), 0)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_pair_is_train_and_test():
    data = load(config("pair", limit_test=4))
    assert (len(data.train), len(data.test)) == (30, 4)


def test_labels_are_read_from_the_items_where_there_is_no_list():
    data = load(config("points", args={"bad": 2}, n_outputs=8, test_fraction=0.1))
    assert sorted(data.train.labels().tolist()) == [0] * 8 + [7]


def test_the_thread_is_off_unless_asked_for():
    assert config("points").prefetch == 0


@pytest.mark.parametrize(
    ("name", "keys", "error", "wrong"),
    [
        ("absent", {}, ConfigError, "has no attribute 'absent'"),
        ("regression", {"args": {"m": 3}}, ConfigError, r"must match .* keyword arguments"),
        ("number", {}, ConfigError, "returned int; it must return a map-style"),
        ("points", {}, ConfigError, "set data.n_outputs"),
        ("words", {}, ConfigError, "set data.n_outputs"),
        ("pictures", {"task": "language"}, ConfigError, 'do not fit task = "language"'),
        ("regression", {"task": "classification"}, ConfigError, "do not fit"),
        ("empty", {}, DataError, "the training set is empty"),
        ("triples", {}, DataError, r"item 0 is tuple; an item must be a pair"),
        ("texts", {}, DataError, "must be numbers"),
    ],
)
def test_what_is_wrong(name, keys, error, wrong):
    with pytest.raises(error, match=wrong):
        load(config(name, **keys))


def test_a_module_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"No module named 'no_such_module'.*PYTHONPATH"):
        load(CustomData(kind="no_such_module:f"))


def test_wrong_items_are_named_when_they_come():
    data = load(config("points", args={"bad": 4}, n_outputs=3))
    part = data.train if 4 in data.train.rows else data.test
    with pytest.raises(DataError, match=r"item 4 has target 7, which is not in 0\.\.2"):
        part.batch(np.arange(len(part)), 0)
    data = load(config("ragged", n_outputs=3))
    with pytest.raises(DataError, match="of one shape"):
        data.train.batch(np.arange(8), 0)
