from __future__ import annotations

import numpy as np
import pytest
from data_files import load, load_on

from hpctrain.data import Synthetic
from hpctrain.data.spec import Spec


def all_of(samples) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = samples.batch(np.arange(len(samples)), 0)
    return inputs.numpy().astype(np.float64), targets.numpy()


def test_least_squares_finds_the_linear_teacher_and_its_noise():
    data = load(Synthetic(task="linear", n_train=20_000, features=5, outputs=3, noise=0.2))
    assert data.spec == Spec("regression", (5,), "float32", 3)
    inputs, targets = all_of(data.train)
    design = np.column_stack([inputs, np.ones(len(inputs))])
    solution, residual, *_ = np.linalg.lstsq(design, targets, rcond=None)
    truth = np.column_stack([data.truth["W"], data.truth["b"]])
    np.testing.assert_allclose(solution.T, truth, atol=0.01)
    np.testing.assert_allclose(np.sqrt(residual / len(inputs)), 0.2, rtol=0.02)


def test_labels_of_the_logistic_teacher_follow_its_softmax():
    data = load(Synthetic(n_train=60_000, features=4, outputs=3, noise=1.0))
    inputs, labels = all_of(data.train)
    logits = inputs @ data.truth["W"].T + data.truth["b"]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    # What a class gets beyond its probability has mean 0, also along each input.
    surplus = np.eye(3)[labels] - chances
    assert abs(surplus.mean(0)).max() < 0.01
    assert abs(inputs.T @ surplus / len(inputs)).max() < 0.01


@pytest.mark.parametrize("task", ["logistic", "mlp"])
def test_without_noise_labels_are_certain(task):
    data = load(Synthetic(task=task, features=6, outputs=4, noise=0.0))
    for part in (data.train, data.test):
        inputs, labels = all_of(part)
        values = inputs @ data.truth["W"].T + data.truth["b"]
        if task == "mlp":
            values = np.tanh(values) @ data.truth["V"].T
        np.testing.assert_array_equal(values.argmax(1), labels)


def test_the_teacher_seed_decides_and_the_runs_does_not():
    config = Synthetic(n_train=100)
    first, second = load(config, seed=1), load(config, seed=2)
    np.testing.assert_array_equal(first.train.inputs, second.train.inputs)
    other = load(Synthetic(n_train=100, teacher_seed=1))
    assert not np.array_equal(first.train.inputs, other.train.inputs)
    assert not np.array_equal(first.train.inputs[:50], first.test.inputs[:50])


def test_a_smaller_set_is_the_beginning_of_a_larger_one():
    large = load(Synthetic(task="mlp", n_train=3000))
    for config in (Synthetic(task="mlp", n_train=3000, limit_train=1500),):
        small = load(config)
        np.testing.assert_array_equal(small.train.inputs, large.train.inputs[:1500])
        # Labels of the last, shorter block draw their noise in another shape.
        np.testing.assert_array_equal(small.train.targets[:1024], large.train.targets[:1024])


def test_ranks_hold_the_same():
    first, second = load_on(2, Synthetic(n_train=10))
    assert np.shares_memory(first.train.inputs, second.train.inputs)
    for name, array in first.truth.items():
        np.testing.assert_array_equal(array, second.truth[name])
