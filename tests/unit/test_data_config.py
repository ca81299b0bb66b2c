from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from hpctrain.data import CifarBinary, CustomData, DataConfig, Digits, Idx, Libsvm, Synthetic, Text

TABLE = TypeAdapter(DataConfig)


@pytest.mark.parametrize(
    ("tree", "member"),
    [
        ({"kind": "digits"}, Digits),
        ({"kind": "idx"}, Idx),
        ({"kind": "cifar-binary"}, CifarBinary),
        ({"kind": "text", "train": "a.txt"}, Text),
        ({"kind": "libsvm", "train": "a9a"}, Libsvm),
        ({"kind": "synthetic"}, Synthetic),
        ({"kind": "my.module:make", "args": {"n": 3}}, CustomData),
    ],
)
def test_kind_selects_the_member_and_survives_a_round_trip(tree, member):
    config = TABLE.validate_python(tree)
    assert type(config) is member
    assert TABLE.validate_python(config.model_dump()) == config


def test_an_unknown_kind_lists_the_members():
    with pytest.raises(ValidationError) as caught:
        TABLE.validate_python({"kind": "cifar"})
    for name in ("digits", "idx", "cifar-binary", "text", "libsvm", "synthetic", "module:function"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "wrong"),
    [
        ({"kind": "digits", "partition": "dirichlet"}, "no alpha"),
        ({"kind": "digits", "alpha": 0.5}, 'partition = "iid" and an alpha'),
        ({"kind": "digits", "partition": "dirichlet", "alpha": 0.0}, "greater than 0"),
        ({"kind": "digits", "augment": "crop-flip"}, "Extra inputs"),
        ({"kind": "digits", "prefetch": -1}, "greater than or equal to 0"),
        ({"kind": "text"}, "Field required"),
        ({"kind": "text", "train": "a", "partition": "dirichlet", "alpha": 1.0}, "have none"),
        ({"kind": "text", "train": "a", "test": "b", "test_fraction": 0.1}, "not both"),
        ({"kind": "libsvm", "train": "a", "test": "b", "test_fraction": 0.1}, "not both"),
        ({"kind": "idx", "mean": [0.5]}, "got 1 and 0"),
        ({"kind": "idx", "mean": [0.5], "std": [0.0]}, "greater than 0"),
        ({"kind": "synthetic", "outputs": 1}, "at least 2 classes"),
        ({"kind": "synthetic", "task": "linear", "hidden": 3}, 'belongs to task = "mlp"'),
        ({"kind": "synthetic", "task": "linear", "partition": "dirichlet", "alpha": 1.0}, "none"),
        ({"kind": "no dots:make"}, "should match pattern"),
    ],
)
def test_impossible_tables_are_refused(tree, wrong):
    with pytest.raises(ValidationError, match=wrong):
        TABLE.validate_python(tree)


def test_every_key_says_what_it_does():
    for name, definition in TABLE.json_schema()["$defs"].items():
        for key, schema in definition["properties"].items():
            assert schema.get("description"), f"{name}.{key}"
