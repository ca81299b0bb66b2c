from __future__ import annotations

import numpy as np
from data_files import load
from sklearn.datasets import load_digits

from hpctrain.data import Digits
from hpctrain.data.spec import Spec


def test_all_digits_scaled_and_split_by_class():
    data = load(Digits())
    assert data.spec == Spec("classification", (1, 8, 8), "float32", 10)
    assert (len(data.train), len(data.test)) == (1438, 359)
    batches = [part.batch(np.arange(len(part)), 0) for part in (data.train, data.test)]
    inputs = np.concatenate([batch[0].numpy().reshape(-1, 64) for batch in batches])
    targets = np.concatenate([batch[1].numpy() for batch in batches])
    pixels, labels = load_digits(return_X_y=True)
    expected = np.column_stack([pixels / 16, labels])
    got = np.column_stack([inputs, targets])
    np.testing.assert_array_equal(got[np.lexsort(got.T)], expected[np.lexsort(expected.T)])
    held = np.bincount(batches[1][1]) / np.bincount(labels)
    assert abs(held - 0.2).max() < 0.01


def test_the_seed_plays_no_part_and_limits_take_the_beginning():
    whole, limited = load(Digits(), seed=1), load(Digits(limit_train=30, limit_test=5), seed=2)
    assert (len(limited.train), len(limited.test)) == (30, 5)
    np.testing.assert_array_equal(limited.train.inputs, whole.train.inputs[:30])
    np.testing.assert_array_equal(limited.test.targets, whole.test.targets[:5])
