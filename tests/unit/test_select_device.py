"""The selection for GPUs, run on the host: sizes are fixed, and it is the top k but for misses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpctrain.compress.select_device import pick_on_device


def heavy_tailed(n: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(n) * np.exp(rng.standard_normal(n))
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("n", [1, 2, 100, 10_000, 300_000])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.3, 1.0])
def test_it_is_the_top_k(n, density):
    x_N = heavy_tailed(n)
    k = int(np.ceil(density * n))
    picked = pick_on_device(x_N, k)
    expected = torch.topk(x_N.abs(), k).indices.sort().values
    torch.testing.assert_close(picked.indices_K, expected)
    torch.testing.assert_close(picked.values_K, x_N[expected])
    assert bool(picked.finite)


def test_a_drifting_stream_seldom_misses():
    rng = np.random.default_rng(3)
    residual_N = torch.zeros(50_000)
    short = 0
    for step in range(200):
        scale = np.exp(np.sin(step / 20) * 4) * np.exp(rng.standard_normal(50_000))
        residual_N += torch.from_numpy((rng.standard_normal(50_000) * scale).astype(np.float32))
        picked = pick_on_device(residual_N, 500, call=step)
        assert len(picked.indices_K) == 500
        assert len(picked.indices_K.unique()) == 500
        short += int((picked.values_K == 0).any())
        residual_N[picked.indices_K] = 0.0
    assert short <= 4


def test_fewer_non_zeros_than_k_are_filled_up_with_zeros():
    x_N = torch.zeros(100_000)
    x_N[[5, 77_777]] = torch.tensor([1.0, -2.0])
    picked = pick_on_device(x_N, 100)
    sent = torch.zeros(100_000).index_add_(0, picked.indices_K, picked.values_K)
    torch.testing.assert_close(sent, x_N)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_seen(value):
    x_N = heavy_tailed(100_000)
    x_N[12_345] = value
    assert not bool(pick_on_device(x_N, 50).finite)
    assert not bool(pick_on_device(x_N, 0).finite)
