"""How many entries to keep: formulas against brute force, optima, samples, edge cases, warm-up."""

import itertools
import time

import numpy as np
import pytest
from pydantic import ValidationError

from hpctrain.exchange.density import (
    BitCost,
    PacketCost,
    SecondCost,
    best_count,
    descent,
    payload_bits,
)
from hpctrain.exchange.tuned import Tuned, TunedDensity, Warmup

COMPRESSORS = ["top", "sign", "stochastic"]


def heavy_tailed(n, seed=0):
    return np.abs(np.random.default_rng(seed).standard_t(3, n)).astype(np.float32)


def curve(compressor, magnitudes):
    ordered = np.sort(magnitudes)[::-1]
    return descent(compressor, ordered, np.arange(1.0, len(ordered) + 1))


def decrease(g, step):
    """Of f(x) = ||x||^2 / 2, whose gradient at x = g is g and whose L is 1, over ||g||^2 / 2."""
    return (g @ g - (g - step) @ (g - step)) / (g @ g)


def test_top_is_the_decrease_of_a_step_along_the_best_subset():
    g = np.random.default_rng(1).normal(size=8)
    for count, found in enumerate(curve("top", np.abs(g)), start=1):
        subsets = itertools.combinations(range(8), count)
        kept = [np.isin(np.arange(8), subset) for subset in subsets]
        assert found == pytest.approx(max(decrease(g, np.where(k, g, 0.0)) for k in kept))


def test_sign_is_the_decrease_of_the_best_step_along_the_signs():
    g = np.random.default_rng(2).normal(size=40)
    order = np.argsort(-np.abs(g))
    for count, found in enumerate(curve("sign", np.abs(g)), start=1):
        q = np.zeros(40)
        q[order[:count]] = np.sign(g[order[:count]])
        scales = np.linspace(0.2, 3.0, 2801)
        assert found == pytest.approx(max(decrease(g, s * q) for s in scales), abs=1e-6)


def water_filling(g, count):
    """The chances by bisection on lambda; they sum to count."""
    low, high = 0.0, count / g[g > 0].min() + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if np.minimum(1.0, middle * g).sum() < count:
            low = middle
        else:
            high = middle
    return np.minimum(1.0, high * g)


def test_stochastic_follows_from_the_chances_found_by_bisection():
    g = np.sort(heavy_tailed(60, seed=3))[::-1].astype(np.float64)
    counts = np.array([0.3, 1.0, 2.5, 7.0, 20.0, 59.0, 60.0])
    for count, found in zip(counts, descent("stochastic", g, counts), strict=True):
        chances = water_filling(g, count)
        assert chances.sum() == pytest.approx(count)
        assert found == pytest.approx((g @ g) / (g * g / chances).sum())


def test_no_other_chances_of_the_same_sum_are_better():
    rng = np.random.default_rng(4)
    g = np.sort(heavy_tailed(30, seed=5))[::-1].astype(np.float64)
    best = descent("stochastic", g, np.array([6.0]))[0]
    for _ in range(300):
        chances = np.clip(water_filling(g, 6.0) * np.exp(rng.normal(0, 0.3, 30)), 1e-6, 1.0)
        chances *= 6.0 / chances.sum()
        if chances.max() <= 1.0:
            assert (g @ g) / (g * g / chances).sum() <= best


def test_stochastic_is_linear_until_a_chance_reaches_one_and_below_top():
    g = heavy_tailed(2000)
    linear = np.arange(1.0, 2001) * (g @ g.astype(np.float64)) / g.sum(dtype=np.float64) ** 2
    omega = curve("stochastic", g)
    unsaturated = int(g.sum() / g.max())
    assert omega[:unsaturated] == pytest.approx(linear[:unsaturated], rel=1e-5)
    assert np.all(omega <= curve("top", g) + 1e-12)
    assert omega[-1] == pytest.approx(1.0)


def test_top_is_concave_and_at_least_its_share():
    alpha = curve("top", heavy_tailed(2000))
    assert np.all(np.diff(alpha, n=2) <= 1e-12)
    assert np.all(alpha >= np.arange(1, 2001) / 2000 - 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_sign_is_best_where_the_next_is_half_the_mean(seed):
    g = np.sort(heavy_tailed(5000, seed))[::-1]
    peak = int(np.argmax(curve("sign", g)))
    assert g[peak + 1] / g[: peak + 1].mean() == pytest.approx(0.5, abs=0.02)


def test_sign_may_have_two_maxima_and_the_higher_one_is_found():
    for ones, best in ((50, 1), (1000, 1001)):
        g = np.array([10.0] + [1.0] * ones)
        beta = curve("sign", g)
        assert beta[0] > beta[1] < beta[-1]
        assert best_count(g, len(g), "sign", BitCost(0.0, 1.0)) == best


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize(
    "cost",
    [
        BitCost(1.0, 512.0),
        PacketCost(4608.0, 512.0, 4096),
        SecondCost(1e-4, 1e-8, compute_s=1e-3, rounds=2),
    ],
)
def test_best_count_is_the_best_of_all_counts(compressor, cost):
    g = heavy_tailed(700)
    counts = np.arange(1.0, 701)
    bits = payload_bits(compressor, counts, 700)
    ratio = curve(compressor, g) / cost.cost(bits)
    assert best_count(g, 700, compressor, cost) == 1 + int(np.argmax(ratio))
    clamped = best_count(g, 700, compressor, cost, 3, 5)
    assert clamped == 3 + int(np.argmax(ratio[2:5]))


def test_without_a_fixed_cost_one_entry_is_best_and_the_count_grows_with_it():
    g = heavy_tailed(2000)
    found = [best_count(g, 2000, "top", BitCost(1.0, c0)) for c0 in (0.0, 1e2, 1e4, 1e6, 1e12)]
    assert found[0] == 1
    assert found == sorted(set(found))
    assert found[-1] == 2000


def test_packets_are_filled():
    g = heavy_tailed(20_000)
    in_packet = 4096 // (15 + 32)
    assert best_count(g, 20_000, "top", PacketCost(4608.0, 0.0, 4096)) == in_packet
    for c0 in (1e4, 1e5, 1e6):
        count = best_count(g, 20_000, "top", PacketCost(4608.0, c0, 4096))
        packets = -(-count * 47 // 4096)
        assert packets > 1
        assert count == packets * 4096 // 47


def test_payloads():
    counts = np.array([1.0, 100.0])
    assert payload_bits("top", counts, 300).tolist() == [41.0, 4100.0]
    assert payload_bits("stochastic", counts, 1 << 20).tolist() == [52.0, 5200.0]
    assert payload_bits("sign", counts, 300).tolist() == [42.0, 1032.0]
    assert payload_bits("top", counts, 300, index_bits=16, value_bits=16).tolist() == [32, 3200]
    assert payload_bits("top", np.array([1.0]), 1).tolist() == [32.0]


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("c0", [1e5, 1e7])
def test_a_sample_serves_nearly_as_well_as_all(compressor, c0):
    n = 1_000_000
    g = heavy_tailed(n)
    cost = BitCost(1.0, c0)
    counts = np.arange(1.0, n + 1)
    ratio = curve(compressor, g) / cost.cost(payload_bits(compressor, counts, n))
    for stride in (1, 64, 257):
        count = best_count(g[stride // 2 :: stride], n, compressor, cost)
        assert ratio[count - 1] >= 0.9 * ratio.max()


def test_a_sample_of_a_large_vector_fills_packets_too():
    n = 10_000_000
    cost = PacketCost(8e6 + 512, 1e7, 8_000_000)
    count = best_count(heavy_tailed(n // 199), n, "top", cost)
    per_packet = 8_000_000 / (24 + 32)
    assert count == int(per_packet * -(-count // per_packet))


def test_a_sample_of_65536_takes_milliseconds():
    g = heavy_tailed(1 << 16)
    for compressor in COMPRESSORS:
        took = []
        for _ in range(5):
            start = time.perf_counter()
            best_count(g, 10_000_000, compressor, BitCost(1.0, 1e6))
            took.append(time.perf_counter() - start)
        assert min(took) < 0.05


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_edge_cases(compressor):
    cost = BitCost(1.0, 1e9)
    none = np.zeros(0, np.float32)
    assert best_count(none, 0, compressor, cost) == 0
    assert best_count(np.ones(1, np.float32), 1, compressor, cost) == 1
    assert best_count(np.zeros(1, np.float32), 1, compressor, cost) == 1
    assert best_count(np.zeros(50, np.float32), 50, compressor, cost) == 1
    assert best_count(np.zeros(50, np.float32), 50, compressor, cost, lowest=7) == 7
    assert best_count(np.ones(50, np.float32), 50, compressor, cost) == 50
    assert best_count(np.ones(50, np.float32), 50, compressor, cost, 60, 70) == 50
    sparse = np.zeros(50, np.float32)
    sparse[[3, 30]] = [2e-30, 1e-30]
    assert best_count(sparse, 50, compressor, cost) == 2
    for bad in (np.nan, np.inf):
        sparse[7] = bad
        assert best_count(sparse, 50, compressor, cost, lowest=2) == 2


def test_of_ties_the_smallest_count_wins():
    assert best_count(np.ones(64), 64, "top", BitCost(1.0, 0.0)) == 1
    assert best_count(np.array([1.0, 0, 0, 0]), 4, "top", PacketCost(1.0, 0.0, 4096)) == 1


def test_tuned_density_stays_between_its_densities():
    g = heavy_tailed(10_000)
    dear = TunedDensity(BitCost(1.0, 1e12), lowest=0.001, highest=0.05)
    cheap = TunedDensity(BitCost(1.0, 0.0), lowest=0.001, highest=0.05)
    assert dear.propose(g, 10_000) == 500
    assert cheap.propose(g, 10_000) == 10
    assert cheap.propose(g[:3], 3) == 1
    between = TunedDensity(BitCost(1.0, 4096.0), 0.001, 0.05)
    assert between.propose(g, 10_000) == best_count(g, 10_000, "top", BitCost(1.0, 4096.0))


def test_tuned_table_names_the_cost():
    seconds = SecondCost(1e-4, 1e-8)
    assert Tuned().cost_of(seconds) is seconds
    assert Tuned(cost="bits").cost_of(seconds) == BitCost(1.0, 512.0)
    assert Tuned(cost="packets").cost_of(seconds) == PacketCost(4608.0, 512.0, 4096)
    with pytest.raises(ValidationError, match="above highest"):
        Tuned(lowest=0.2, highest=0.1)


def test_a_slower_network_sends_less():
    g = heavy_tailed(10_000)
    found = [
        best_count(g, 10_000, "top", SecondCost(1e-4, per_bit, compute_s=1e-3))
        for per_bit in (1e-6, 1e-8, 1e-10)
    ]
    assert found == sorted(set(found))


def test_warmup_halves_twice_per_stage():
    warmup = Warmup(target=0.001, steps=8, volume=lambda density: 1.5 * density)
    found = [warmup.density_at(step) for step in range(10)]
    assert found == [0.25] * 2 + [0.0625] * 2 + [0.015625] * 2 + [0.00390625] * 2 + [0.001] * 2


def test_warmup_runs_dense_where_sparse_would_send_more():
    warmup = Warmup(target=0.01, steps=6, volume=lambda density: 32 * density)
    found = [warmup.density_at(step) for step in range(7)]
    assert found == [1.0] * 4 + [0.015625] * 2 + [0.01]


def test_warmup_without_steps_or_stages():
    assert Warmup(0.25, 0, lambda density: density).density_at(0) == 0.25
    with pytest.raises(ValueError, match="warmup_steps = 5 has no effect"):
        Warmup(0.25, 5, lambda density: density)
