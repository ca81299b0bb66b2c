"""Closed forms of B_S for generalised linear models, with known answers (batch.md, 1.3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.stats import glm
from hpctrain.stats.diversity import of_matrix


def signs(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice([-1.0, 1.0], (n, d))


def sparse(n: int, d: int, each: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = np.zeros((n, d))
    for row in x:
        row[rng.choice(d, each, replace=False)] = rng.standard_normal(each)
    return x


def test_random_features_of_two_values():
    x = signs(2000, 200)
    bound = glm.feature_bound(x)
    assert bound == pytest.approx(116.1, rel=0.02)
    assert glm.random_feature_bound(2000, 200) == pytest.approx(bound, rel=0.02)
    assert glm.b_s(x, glm.worst_residuals(x)) == pytest.approx(bound, rel=1e-9)
    random = [glm.b_s(x, np.random.default_rng(s).standard_normal(2000)) for s in range(20)]
    assert np.mean(random) == pytest.approx(2034, rel=0.05)


@given(st.integers(3, 30), st.integers(1, 8), st.integers(0, 1000))
def test_nothing_falls_below_the_bound(n, d, seed):
    rng = np.random.default_rng(seed)
    x, residual = rng.standard_normal((n, d)), rng.standard_normal(n)
    found = glm.b_s(x, residual)
    assert found >= glm.feature_bound(x) * (1 - 1e-9)
    assert found == pytest.approx(of_matrix(torch.from_numpy(x * residual[:, None])).b_s, rel=1e-6)


def test_conflict_graph():
    x = np.array([[1.0, 0, 0], [2, 3, 0], [0, 1, 0], [0, 0, 5]])
    assert glm.conflicts(x) == 2
    assert glm.conflict_bound(x) == pytest.approx(4 / 3)
    assert glm.conflicts(np.eye(5)) == 0


def test_sparse_features():
    """n = 300 with a busiest sample of 8 neighbours: bound 33.3, measured far above."""
    x = sparse(300, 900, 2, seed=221)
    assert glm.conflicts(x) == 8
    bound = glm.conflict_bound(x)
    assert bound == pytest.approx(33.3, abs=0.1)
    measured = [glm.b_s(x, np.random.default_rng(s).standard_normal(300)) for s in range(20)]
    assert min(measured) >= bound
    assert 200 < np.mean(measured) < 350
