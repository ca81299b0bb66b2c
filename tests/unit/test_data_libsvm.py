from __future__ import annotations

import bz2

import numpy as np
import pytest
from data_files import load, load_on

from hpctrain.data import Libsvm
from hpctrain.data.spec import Spec
from hpctrain.errors import DataError

LINES = "+1 1:0.5 3:-2e1 # a comment\n\n-1 2:1\n+1\n# only a comment\n-1 4:.25\r\n"


def write(folder, text: str, name: str = "a") -> Libsvm:
    (folder / name).write_text(text, newline="")
    return Libsvm(root=str(folder), train=name, test=name)


def test_lines_become_dense_rows_and_labels_classes(tmp_path):
    data = load(write(tmp_path, LINES))
    assert data.spec == Spec("classification", (4,), "float32", 2)
    inputs, labels = data.train.batch(np.arange(4), 0)
    assert inputs.tolist() == [[0.5, 0, -20, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.25]]
    assert labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("labels", [(-1, 1), (1, 2), (0, 1), (3, 7, 12), (-0.5, 0.5)])
def test_any_set_of_labels_maps_to_0_to_c(tmp_path, labels):
    config = write(tmp_path, "".join(f"{labels[i % len(labels)]} 1:{i}\n" for i in range(12)))
    data = load(config)
    assert data.spec.n_outputs == len(labels)
    assert data.train.labels().tolist() == [i % len(labels) for i in range(12)]


def test_the_set_may_be_wider_than_what_occurs(tmp_path):
    (tmp_path / "t").write_text("-1 2:3\n+1 1:1\n")
    write(tmp_path, LINES)
    data = load(Libsvm(root=str(tmp_path), train="a", test="t"))
    assert data.test.batch(np.arange(2), 0)[0].tolist() == [[0, 3, 0, 0], [1, 0, 0, 0]]
    wide = load(Libsvm(root=str(tmp_path), train="a", test="t", n_features=9))
    assert wide.spec.input_shape == (9,)
    assert wide.train.batch(np.arange(4), 0)[0][:, 4:].abs().sum() == 0


def test_counting_from_0(tmp_path):
    (tmp_path / "a").write_text("1 0:5 2:6\n2 1:7\n")
    data = load(Libsvm(root=str(tmp_path), train="a", test="a", first_index=0))
    assert data.train.batch(np.arange(2), 0)[0].tolist() == [[5, 0, 6], [0, 7, 0]]


def test_a_part_is_held_out_by_class_and_limits_hold(tmp_path):
    (tmp_path / "a.bz2").write_bytes(
        bz2.compress("".join(f"{1 + (i % 10 == 0)} 1:{i + 1}\n" for i in range(200)).encode())
    )
    data = load(Libsvm(root=str(tmp_path), train="a"))
    assert np.bincount(data.train.labels()).tolist() == [144, 16]
    assert np.bincount(data.test.labels()).tolist() == [36, 4]
    rows = np.concatenate([part.inputs[:, 0] for part in (data.train, data.test)])
    assert sorted(rows.tolist()) == list(range(1, 201))
    for part in (data.train, data.test):
        assert ((part.inputs[:, 0].astype(int) - 1) % 10 == 0).tolist() == part.labels().tolist()
    limited = load(Libsvm(root=str(tmp_path), train="a", limit_train=7, limit_test=5))
    assert (len(limited.train), len(limited.test)) == (7, 5)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("one 1:2", "'one' is not a label"),
        ("1 2", "'2' is not index:value"),
        ("1 1:x", "'1:x' is not index:value"),
        ("1 1:nan", "'1:nan' is not index:value"),
        ("1 1:2 1:3", "must ascend"),
        ("1 3:2 2:3", "must ascend"),
        ("1 0:2", r"index 0, but .* set data.first_index = 0"),
        ("1 -1:2", "'-1:2' is not index:value"),
        ("1 qid:3 1:2", "'qid:3' is not index:value"),
        ("1,2 1:2", "'1,2' is not a label"),
        ("1 1:1e60", "too large for float32"),
        ("\xff 1:1", "is not a label"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, wrong):
    (tmp_path / "a").write_text(f"-1 1:1\n\n{line}\n+1 1:1\n", encoding="latin-1")
    with pytest.raises(DataError, match=rf"a: line 3: .*{wrong}"):
        load_on(2, Libsvm(root=str(tmp_path), train="a", test="a"))


def test_an_index_beyond_the_width(tmp_path):
    (tmp_path / "a").write_text("1 1:1\n2 5:1\n")
    with pytest.raises(DataError, match=r"line 2: index 5 is beyond data.n_features = 4"):
        load(Libsvm(root=str(tmp_path), train="a", test="a", n_features=4))


def test_a_label_that_training_lacks(tmp_path):
    (tmp_path / "a").write_text("1 1:1\n2 1:1\n")
    (tmp_path / "t").write_text("# t\n2 1:1\n3 1:1\n")
    with pytest.raises(DataError, match=r"t: line 3: label 3 does not occur in .* are 1, 2"):
        load(Libsvm(root=str(tmp_path), train="a", test="t"))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "holds no example"),
        ("1 1:1\n1 2:1\n", "1 distinct label"),
        ("1 1:1\n2 2:1\n", "too few to hold out"),
        ("".join(f"{i / 7} 1:1\n" for i in range(1500)), "1500 distinct label"),
    ],
)
def test_sets_that_cannot_be_classified(tmp_path, text, wrong):
    (tmp_path / "a").write_text(text)
    with pytest.raises(DataError, match=wrong):
        load(Libsvm(root=str(tmp_path), train="a"))


@pytest.mark.data
@pytest.mark.parametrize(
    ("train", "test", "shape"),
    [
        ("a9a", "a9a.t", (32_561, 16_281, 123)),
        ("mushrooms", "", (6_499, 1_625, 112)),
        ("phishing", "", (8_844, 2_211, 68)),
    ],
)
def test_the_real_sets(data_root, train, test, shape):
    folder = data_root / "libsvm"
    data = load(Libsvm(root=str(folder), train=train, test=test))
    assert (len(data.train), len(data.test), *data.spec.input_shape) == shape
    assert data.spec.n_outputs == 2
