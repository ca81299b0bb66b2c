"""Gradient noise: known answers, identities, and what the intervals promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpctrain.stats.average import FEWEST, REMEMBERED, NoiseAverage, mean_squares, windows
from hpctrain.stats.interval import BLOCKS, cut, ratio_of
from hpctrain.stats.noise import GroupSums, NoiseEstimate
from hpctrain.stats.skew import data_skew, within_ranks
from hpctrain.stats.words import (
    efficiency_in_words,
    noise_in_words,
    sample_efficiency,
    short,
)


def sums_of(samples_BP: np.ndarray, sizes: tuple[int, ...]) -> GroupSums:
    """What groups of consecutive samples' gradients add up to."""
    groups = np.split(samples_BP, np.cumsum(sizes)[:-1])
    weighted = sum(len(group) * np.sum(group.mean(0) ** 2) for group in groups)
    return GroupSums(len(sizes), len(samples_BP), weighted, np.sum(samples_BP.mean(0) ** 2))


def truth_of(samples_nP: np.ndarray) -> tuple[float, float]:
    """(s2, mu2) of a whole set."""
    mean = samples_nP.mean(0)
    return float(np.mean(np.sum((samples_nP - mean) ** 2, 1))), float(mean @ mean)


def drawn(
    rng: np.random.Generator,
    s2_t: np.ndarray,
    b_s_t: np.ndarray,
    batch_t: np.ndarray,
    groups: int = 4,
    dimension: int = 100,
) -> list[GroupSums]:
    """Sums of steps with normal gradients of equal variance in every direction."""
    steps = len(s2_t)
    mu2_t = s2_t / (b_s_t - 1.0)
    one = s2_t / dimension
    along = np.sqrt(mu2_t) + np.sqrt(one / batch_t) * rng.standard_normal(steps)
    mean_sq = along**2 + one / batch_t * rng.chisquare(dimension - 1, steps)
    s2_hat = one * rng.chisquare(dimension * (groups - 1), steps) / (groups - 1)
    weighted = batch_t * mean_sq + (groups - 1) * s2_hat
    return [GroupSums(groups, *row) for row in np.stack([batch_t, weighted, mean_sq], 1).tolist()]


def averaged(sums: list[GroupSums]) -> NoiseAverage:
    average = NoiseAverage()
    for one in sums:
        average.add(one)
    return average


def estimate_of(sums: list[GroupSums]) -> NoiseEstimate:
    estimate = averaged(sums).estimate()
    assert estimate is not None
    return estimate


# --- one step -------------------------------------------------------------------------------------


def test_every_draw_of_a_tiny_set_gives_its_moments_on_average():
    set_nP = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]])
    for sizes in [(1, 2), (1, 1, 1), (2, 1, 1)]:
        draws = itertools.product(range(3), repeat=sum(sizes))
        found = [sums_of(set_nP[list(draw)], sizes).moments() for draw in draws]
        assert np.mean(found, 0) == pytest.approx(truth_of(set_nP), rel=1e-12)


def test_draws_without_replacement_tell_of_fresh_samples():
    """Of a fixed set: s2_hat n s2 / (n - 1), mu2_hat less by its n-th part."""
    set_nP = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0], [2.0, 2.0]])
    s2, mu2 = truth_of(set_nP)
    for sizes in [(1, 2), (2, 2), (1, 1, 1, 1)]:
        orders = itertools.permutations(range(4), sum(sizes))
        found = [sums_of(set_nP[list(order)], sizes).moments() for order in orders]
        assert np.mean(found, 0) == pytest.approx((s2 * 4 / 3, mu2 - s2 / 3), rel=1e-12)


def test_unequal_groups_are_unbiased():
    rng = np.random.default_rng(0)
    sizes, trials, dimension = (3, 5, 8, 16), 10_000, 12
    mean = np.zeros(dimension)
    mean[0] = 1.0
    spread = np.sqrt(100.0 / dimension)
    found = np.array(
        [
            sums_of(mean + spread * rng.standard_normal((32, dimension)), sizes).moments()
            for _ in range(trials)
        ]
    )
    error = found.std(0) / math.sqrt(trials)
    assert np.all(np.abs(found.mean(0) - (100.0, 1.0)) < 3.5 * error)
    assert np.all(error < (0.5, 0.05))


def test_the_noise_of_a_single_step_is_as_derived():
    """sd(mu2_hat) / mu2 = sqrt(2/d (B_simple/B)² K/(K-1) + 4 lambda/(mu2 B)), lambda = s2/d."""
    rng = np.random.default_rng(1)
    n, s2, b_s = 40_000, 1.0, 201.0
    for groups, batch, dimension in [(2, 64, 30), (8, 64, 30), (4, 1000, 200)]:
        steps = drawn(rng, np.full(n, s2), np.full(n, b_s), np.full(n, batch), groups, dimension)
        found = np.std([one.moments()[1] for one in steps]) * 200.0
        noise = 2.0 / dimension * (200.0 / batch) ** 2 * groups / (groups - 1)
        assert found == pytest.approx(math.sqrt(noise + 4 * 200.0 / dimension / batch), rel=0.03)


def test_one_group_says_nothing():
    with pytest.raises(ValueError, match="two groups"):
        NoiseAverage().add(GroupSums(1, 8, 1.0, 1.0))


# --- identities -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradients() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((9, 4)) + 0.7


def b_s_of(samples_nP: np.ndarray) -> float:
    s2, mu2 = truth_of(samples_nP)
    return 1.0 + s2 / mu2


def test_diversity_is_one_plus_the_noise_scale(gradients):
    total = gradients.sum(0)
    diversity = np.sum(gradients**2) / (total @ total)
    assert len(gradients) * diversity == pytest.approx(b_s_of(gradients), rel=1e-12)


def test_the_sum_of_a_batch_is_inflated_by_one_plus_delta(gradients):
    """Yin: E|sum of B gradients|² = B M2 (1 + (B - 1) / B_S), B drawn with replacement."""
    b_s, m2 = b_s_of(gradients), np.mean(np.sum(gradients**2, 1))
    for batch in (1, 2, 3):
        draws = itertools.product(range(len(gradients)), repeat=batch)
        found = np.mean([np.sum(gradients[list(draw)].sum(0) ** 2) for draw in draws])
        assert found == pytest.approx(batch * m2 * (1 + (batch - 1) / b_s), rel=1e-12)


def test_gain_efficiency_and_cosine_are_the_same_number(gradients):
    s2, mu2 = truth_of(gradients)
    b_s, phi = b_s_of(gradients), s2 / mu2
    for batch in (1, 7, 64):
        gain = (s2 + mu2) / (s2 / batch + mu2)
        assert gain / batch == pytest.approx(sample_efficiency(b_s, batch), rel=1e-12)
        pollux = (phi + 1) / (phi + batch)
        assert pollux == pytest.approx(sample_efficiency(b_s, batch), rel=1e-12)
    # Two halves of a batch of 2: E<g1, g2> / E|g|² with independent draws.
    draws = list(itertools.product(gradients, repeat=2))
    cosine = np.mean([a @ b for a, b in draws]) / np.mean([a @ a for a, _ in draws])
    assert cosine == pytest.approx(1 / (1 + 2 * phi / 2), rel=1e-12)


def test_the_norm_test_asks_for_b_simple_over_eta_squared(gradients):
    s2, mu2 = truth_of(gradients)
    eta = 0.5
    batch = s2 / mu2 / eta**2
    assert s2 / batch == pytest.approx(eta**2 * mu2, rel=1e-12)
    assert batch == pytest.approx(4 * (b_s_of(gradients) - 1), rel=1e-12)


def test_the_diversity_of_a_sub_sample_is_too_small_by_a_known_factor(gradients):
    n, b_s, m2 = len(gradients), b_s_of(gradients), np.mean(np.sum(gradients**2, 1))
    for m in (2, 3, 5):
        draws = itertools.combinations(range(n), m)
        square = np.mean([np.sum(gradients[list(draw)].mean(0) ** 2) for draw in draws])
        diversity = m2 / m / square
        without_set = (m - 1) * diversity / (1 - diversity)
        assert n * without_set / (n - 1 + without_set) == pytest.approx(b_s, rel=1e-12)
        s2, mu2 = truth_of(gradients)
        naive = m2 / (mu2 + s2 / m)
        assert naive == pytest.approx(m * b_s / (b_s + m - 1), rel=1e-12)
        assert naive < m


# --- intervals ------------------------------------------------------------------------------------


def test_the_ends_are_where_fieller_puts_them():
    rng = np.random.default_rng(3)
    top, bottom = 5 + rng.standard_normal(BLOCKS), 2 + rng.standard_normal(BLOCKS)
    found = ratio_of(np.ones(BLOCKS), top, bottom, np.array([0]))
    assert found.resolved[0]
    for end in (found.low[0], found.high[0]):
        off = top - end * bottom
        assert abs(off.mean()) == pytest.approx(1.753 * off.std(ddof=1) / math.sqrt(BLOCKS))
    assert found.low[0] < top.mean() / bottom.mean() < found.high[0]


def test_a_denominator_within_its_noise_has_a_lower_end_only():
    rng = np.random.default_rng(4)
    top, noise = 5 + rng.standard_normal(BLOCKS), rng.standard_normal(BLOCKS)
    for mean in (0.2, 0.0, -3.0):
        bottom = noise - noise.mean() + mean
        found = ratio_of(np.ones(BLOCKS), top, bottom, np.array([0]))
        assert not found.resolved[0]
        assert found.high[0] == math.inf
        off = top - found.low[0] * (bottom if mean > 0 else bottom - mean)
        assert off.mean() == pytest.approx(1.753 * off.std(ddof=1) / math.sqrt(BLOCKS))


@example([1.0, 0.0, 0.0], 2)
@given(
    st.lists(st.floats(0.0, 1e3), min_size=1, max_size=80).filter(any),
    st.integers(0, 79),
)
def test_blocks_are_whole_steps_of_about_equal_weight(weights, start):
    weight_n = np.array(weights)
    start = min(start, len(weights) - 1)
    (edges,) = cut(weight_n, np.array([start]))
    assert edges[0] == start
    assert edges[-1] == len(weights)
    assert np.all(np.diff(edges) >= 0)
    window = weight_n[start:]
    for a, b in itertools.pairwise(edges):
        slack = window.max() * (1 + 1e-9) + 1e-9
        assert abs(weight_n[a:b].sum() - window.sum() / BLOCKS) <= slack


def test_windows_double_and_end_with_all():
    assert windows(10).tolist() == [0]
    assert (100 - windows(100)).tolist() == [16, 32, 64, 100]
    assert (128 - windows(128)).tolist() == [16, 32, 64, 128]


def test_a_step_is_scaled_by_other_steps_only():
    square_n = np.arange(1.0, 41.0)
    scale_n, latest = mean_squares(square_n)
    assert scale_n[20] == pytest.approx(square_n[4:20].mean())
    assert scale_n[3] == pytest.approx(np.delete(square_n[:16], 3).mean())
    assert latest == pytest.approx(square_n[24:].mean())
    for changed in (0, 3, 20, 39):
        other_n = square_n.copy()
        other_n[changed] = 1e3
        assert mean_squares(other_n)[0][changed] == pytest.approx(scale_n[changed])


# --- averages -------------------------------------------------------------------------------------


def test_nothing_is_said_too_early_nor_of_zero_gradients():
    rng = np.random.default_rng(5)
    sums = drawn(rng, np.ones(FEWEST), np.full(FEWEST, 10.0), np.full(FEWEST, 64.0))
    assert averaged(sums[:-1]).estimate() is None
    assert averaged(sums).estimate() is not None
    assert averaged([GroupSums(4, 64, 0.0, 0.0)] * 50).estimate() is None


def test_equal_gradients_are_a_bound_of_one():
    estimate = estimate_of([GroupSums(4, 64, 64 * 3.0, 3.0)] * 50)
    assert (estimate.b_s, estimate.low, estimate.high, estimate.resolved) == (1.0, 1.0, 1.0, True)
    assert (estimate.s2, estimate.mu2) == pytest.approx((0.0, 3.0))


def test_sums_that_are_not_finite_are_skipped_and_counted():
    good = GroupSums(4, 64, 65.0, 1.0)
    average = averaged([good, GroupSums(4, 64, math.inf, 1.0), GroupSums(4, 64, math.nan, 1.0)])
    assert average.skipped == 2
    assert len(average.state().tensors["steps"].tensor) == 1


def test_gradients_in_other_units_change_moments_only():
    rng = np.random.default_rng(6)
    sums = drawn(rng, np.ones(100), np.full(100, 30.0), np.full(100, 64.0))
    scaled = [GroupSums(4, s.samples, 1e6 * s.weighted_sq, 1e6 * s.mean_sq) for s in sums]
    a, b = estimate_of(sums), estimate_of(scaled)
    assert (b.b_s, b.low, b.high, b.steps) == pytest.approx((a.b_s, a.low, a.high, a.steps))
    assert (b.s2, b.mu2) == pytest.approx((1e6 * a.s2, 1e6 * a.mu2))
    assert 1 + b.s2 / b.mu2 == pytest.approx(b.b_s)


@pytest.mark.parametrize("steps", [5, 300, 2 * REMEMBERED + 700])
def test_the_state_is_the_same_bits(steps):
    rng = np.random.default_rng(7)
    sums = drawn(rng, np.ones(steps + 9), np.full(steps + 9, 90.0), np.full(steps + 9, 64.0))
    whole, first = averaged(sums), averaged(sums[:steps])
    resumed = NoiseAverage()
    resumed.add(sums[0])
    resumed.load_state(first.state())
    for one in sums[steps:]:
        resumed.add(one)
    assert len(whole.state().tensors["steps"].tensor) <= REMEMBERED
    assert whole.state().tensors["steps"].tensor.equal(resumed.state().tensors["steps"].tensor)
    assert whole.estimate() == resumed.estimate()


@pytest.mark.parametrize("seed", range(5))
def test_gradients_that_shrink_do_not_hold_it_back(seed):
    """Squares fall 100-fold and more over 500 steps, B_S rises from 20 to 2000."""
    steps, batch = 500, 128.0
    rise = np.linspace(0.0, 1.0, steps)
    s2_t, b_s_t = 100.0 * 100.0**-rise, 20.0 * 100.0**rise
    sums = drawn(np.random.default_rng(seed), s2_t, b_s_t, np.full(steps, batch), dimension=300)
    average, resolved = NoiseAverage(), 0
    for t, one in enumerate(sums):
        average.add(one)
        estimate = average.estimate() if t % 50 == 49 else None
        if estimate is None:
            continue
        if estimate.resolved:
            resolved += 1
            assert 0.5 < estimate.b_s / b_s_t[t] < 2.0
        else:
            assert estimate.low < b_s_t[t]
    assert resolved >= 7
    plain = np.mean([one.moments() for one in sums], 0)
    assert 1.0 + plain[0] / plain[1] < b_s_t[-1] / 10


def test_a_bound_rests_on_the_steps_that_still_tell_most():
    """Steps of another time, with a mean gradient a hundred times larger, do not lower it."""
    rng = np.random.default_rng(12)
    b_s_t = np.repeat([100.0, 10_000.0], [250, 250])
    found = []
    for _ in range(20):
        found.append(estimate_of(drawn(rng, 1.0 / b_s_t, b_s_t, np.full(500, 64.0), dimension=30)))
        assert found[-1].steps < 500
    assert sum(one.low <= 10_000 <= one.high for one in found) >= 16
    assert sum(one.resolved for one in found) <= 3
    assert np.median([one.low for one in found]) > 1000


def test_a_growing_batch_counts_for_more():
    rng = np.random.default_rng(9)
    b_s = 3000.0
    batch_t = np.repeat([32.0, 1024.0], [300, 60])
    estimate = estimate_of(drawn(rng, np.ones(360), np.full(360, b_s), batch_t, dimension=300))
    late = estimate_of(drawn(rng, np.ones(360), np.full(360, b_s), np.full(360, 32.0)))
    assert estimate.resolved
    assert estimate.low < b_s < estimate.high
    assert not late.resolved
    assert late.low < b_s


@pytest.mark.parametrize(
    ("b_s", "dimension", "groups", "steps"),
    [(60.0, 100, 2, 30), (300.0, 100, 4, 200), (3000.0, 1000, 8, 400), (60.0, 8, 4, 300)],
)
def test_intervals_cover_as_often_as_they_say(b_s, dimension, groups, steps):
    rng = np.random.default_rng(10)
    ones = np.ones(steps)
    covered = 0
    for _ in range(120):
        sums = drawn(rng, ones, b_s * ones, 64 * ones, groups, dimension)
        estimate = estimate_of(sums)
        covered += estimate.low <= b_s <= estimate.high
        assert estimate.resolved == (estimate.high < math.inf)
    assert covered >= 0.83 * 120


# --- ranks with unlike data -----------------------------------------------------------------------


def test_noise_inside_ranks_leaves_out_what_ranks_differ_by():
    rng = np.random.default_rng(11)
    like, unlike = [], []
    for _ in range(60):
        samples = rng.standard_normal((2, 3, 4, 5))
        for apart, found in ((0.0, like), (3.0, unlike)):
            given_ = samples + apart * np.array([1.0, -1.0])[:, None, None, None]
            ranks = sums_of(given_.reshape(24, 5), (12, 12))
            micro = sums_of(given_.reshape(24, 5), (4,) * 6)
            inside = within_ranks(micro.weighted_sq, ranks.weighted_sq, 6, 2)
            found.append((ranks.moments()[0], inside))
    assert np.mean([w for _, w in like]) == pytest.approx(5.0, rel=0.1)
    assert [w for _, w in like] == pytest.approx([w for _, w in unlike])
    alike, skewed = (data_skew(*np.array(found).T) for found in (like, unlike))
    assert not alike.skewed
    assert alike.ratio == pytest.approx(1.0, abs=0.3)
    assert skewed.skewed
    assert skewed.ratio > 20


def test_too_little_is_known_of_the_noise_inside_ranks():
    with pytest.raises(ValueError, match="two micro-batches"):
        within_ranks(1.0, 1.0, 4, 4)
    assert data_skew(np.ones(FEWEST - 1), np.ones(FEWEST - 1)) is None
    assert data_skew(np.ones(20), np.zeros(20)) is None


# --- words ----------------------------------------------------------------------------------------


def test_words():
    seen = NoiseEstimate(3100.0, 2200.0, 4600.0, True, 1.0, 1.0, 10)
    assert noise_in_words(seen) == "B_S 3.1k [2.2k-4.6k]"
    assert efficiency_in_words(seen, 512) == "sample efficiency 86 %"
    bound = NoiseEstimate(-5.0, 4200.0, math.inf, False, 1.0, -1.0, 10)
    assert noise_in_words(bound) == "B_S at least 4.2k"
    assert efficiency_in_words(bound, 512) == "sample efficiency at least 89 %"
    words = [short(x) for x in (1.0, 9.96, 870, 999.6, 33_000, 1.2e6, 2.5e9, 7e12)]
    assert words == ["1.0", "10", "870", "1.0k", "33k", "1.2M", "2.5G", "7T"]
