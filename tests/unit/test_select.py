"""Selection is the exact top k, at every shape of vector, and sees every inf and NaN."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hpctrain.compress import scan
from hpctrain.compress.select import BLOCK, Selector
from hpctrain.errors import ConfigError

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
KERNELS = ["numpy", pytest.param("numba", marks=needs_numba)]


def expected(x_N: np.ndarray, k: int) -> np.ndarray:
    """Positions of the top k by a stable sort: the first among equals."""
    order = np.argsort(-np.abs(x_N), kind="stable")[:k]
    return np.sort(order[x_N[order] != 0])


def heavy_tailed(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * np.exp(rng.standard_normal(n))).astype(np.float32)


@pytest.mark.parametrize("n", [0, 1, 2, 100, BLOCK - 1, BLOCK, BLOCK + 1, 300_000])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_exact_top_k(n, density, kernel):
    x_N = heavy_tailed(n)
    k = int(np.ceil(density * n))
    picked = Selector(n, kernel=kernel).pick(x_N, k)
    np.testing.assert_array_equal(picked.indices_K, expected(x_N, k))
    np.testing.assert_array_equal(picked.values_K, x_N[picked.indices_K])
    assert picked.indices_K.dtype == np.uint32
    assert picked.finite


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=200)
@given(
    x_N=arrays.arrays(
        np.float32,
        st.integers(0, 400),
        elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40]),
    ),
    k=st.integers(0, 401),
    block=st.sampled_from([1, 7, 64]),
)
def test_ties_and_zeros(kernel, x_N, k, block):
    picked = Selector(len(x_N), block, kernel).pick(x_N, k)
    np.testing.assert_array_equal(picked.indices_K, expected(x_N, k))


def test_every_step_of_a_drifting_stream_has_exactly_k_entries():
    n, k = 50_000, 500
    rng = np.random.default_rng(3)
    selector = Selector(n)
    residual_N = np.zeros(n, np.float32)
    for step in range(300):
        scale = np.exp(np.sin(step / 20) * 4) * np.exp(rng.standard_normal(n))
        residual_N += (rng.standard_normal(n) * scale).astype(np.float32)
        picked = selector.pick(residual_N, k)
        assert len(picked.indices_K) == k
        residual_N[picked.indices_K] = 0.0


def test_entries_that_hide_from_the_sample_are_found():
    n = 1_000_000
    x_N = np.zeros(n, np.float32)
    x_N[17::1000] = 1.0
    picked = Selector(n).pick(x_N, 900)
    np.testing.assert_array_equal(picked.indices_K, np.arange(17, n, 1000)[:900])


def test_blocks_are_prepared_once_in_order_even_when_the_threshold_is_missed():
    n = 200_000
    x_N = np.zeros(n, np.float32)
    source_N = heavy_tailed(n)
    seen = []

    def prepare(start: int, stop: int) -> None:
        seen.append((start, stop))
        x_N[start:stop] += source_N[start:stop]

    def misleading(where: slice) -> np.ndarray:
        return np.full(len(source_N[where]), 1e3, np.float32)

    picked = Selector(n).pick(x_N, 100, sample=misleading, prepare=prepare)
    np.testing.assert_array_equal(x_N, source_N)
    np.testing.assert_array_equal(picked.indices_K, expected(source_N, 100))
    assert seen == [(a, min(a + BLOCK, n)) for a in range(0, n, BLOCK)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 12_345, 99_999])
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_value_that_is_not_finite_is_seen(value, at, kernel):
    x_N = heavy_tailed(100_000)
    x_N[at] = value
    selector = Selector(len(x_N), kernel=kernel)
    assert not selector.pick(x_N, 50).finite
    assert not selector.pick(np.full(1000, value, np.float32), 50).finite
    assert not selector.pick(x_N, 0).finite
    assert not selector.pick(x_N, len(x_N)).finite


@needs_numba
@given(
    x_B=arrays.arrays(np.float32, st.integers(0, 70), elements=st.floats(width=32)),
    threshold=st.floats(0.0, 1e30),
)
def test_both_kernels_find_the_same(x_B, threshold):
    first, second = (scan.make_scan(kernel, 70)(x_B, threshold) for kernel in ("numpy", "numba"))
    np.testing.assert_array_equal(first, second)


def test_numba_is_asked_for_by_name_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(scan.importlib.util, "find_spec", lambda name: None)
    assert scan.chosen("auto") == scan.chosen("numpy") == "numpy"
    with pytest.raises(ConfigError, match="numba is not installed here"):
        scan.chosen("numba")


def test_indices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="uint32"):
        Selector(1 << 32)
