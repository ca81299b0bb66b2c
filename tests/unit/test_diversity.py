"""Gradient diversity: definitions, the one-number identity, known answers, sub-samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.stats.diversity import (
    Diversity,
    Moments,
    effective_rank,
    from_sums,
    of_matrix,
    replicated_b_s,
)


def gradients(n: int, d: int, seed: int, mean: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + mean


def over_rows(g_ND: torch.Tensor, population: int) -> Diversity:
    sizes = [g_ND.shape[1]]
    return from_sums(
        len(g_ND), population, ["all"], sizes, g_ND.square().sum()[None], g_ND.sum(0)
    )  # fmt: skip


def test_known_answers():
    equal = of_matrix(torch.ones(10, 4))
    assert (equal.delta_s, equal.b_s, equal.s2) == pytest.approx((0.1, 1.0, 0.0))
    orthogonal = of_matrix(torch.eye(8))
    assert (orthogonal.delta_s, orthogonal.b_s) == pytest.approx((1.0, 8.0))
    cancelling = of_matrix(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    assert cancelling.b_s == math.inf
    assert math.isnan(of_matrix(torch.zeros(3, 2)).b_s)
    with pytest.raises(ValueError, match="2 samples or more out of 1; got 1"):
        of_matrix(torch.ones(1, 2))
    with pytest.raises(ValueError, match="got 6"):
        Moments(6, 5, 1.0, 1.0)


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 1000))
def test_the_identity(n, d, seed):
    """B_S = n Delta_S = E|g|² / |E g|² = 1 + s2 / mu2 (batch.md, section 0)."""
    g = gradients(n, d, seed)
    found = of_matrix(g)
    mean = g.mean(0)
    direct = float(g.square().sum() / g.sum(0).square().sum())
    assert found.delta_s == pytest.approx(direct, rel=1e-9)
    assert found.mu2 == pytest.approx(float(mean @ mean), rel=1e-9)
    assert found.s2 == pytest.approx(float((g - mean).square().sum() / n), rel=1e-9)
    assert found.b_s == pytest.approx(1 + found.s2 / found.mu2, rel=1e-9)
    assert found.b_s >= 1.0
    assert found.resolved


def test_inflation_of_a_sum_of_gradients():
    """E|sum of B gradients|² = B M2 (1 + (B - 1) / B_S), drawn with replacement."""
    g = gradients(50, 3, 0)
    batch, draws = 8, 200_000
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(50, (draws, batch), generator=generator)
    measured = float(g[counts].sum(1).square().sum(1).mean())
    predicted = batch * float(g.square().sum(1).mean()) * (1 + (batch - 1) / of_matrix(g).b_s)
    assert measured == pytest.approx(predicted, rel=0.01)


def test_layers_add_up():
    g = gradients(20, 7, 1)
    squares = torch.stack([g[:, :3].square().sum(), g[:, 3:].square().sum()])
    found = from_sums(20, 20, ["a", "b"], [3, 4], squares, g.sum(0))
    whole = of_matrix(g)
    assert found.b_s == pytest.approx(whole.b_s)
    (first, a), (second, b) = found.layers
    assert (first, second) == ("a", "b")
    assert a.b_s == pytest.approx(of_matrix(g[:, :3]).b_s)
    assert a.s2 + b.s2 == pytest.approx(whole.s2)
    assert a.mu2 + b.mu2 == pytest.approx(whole.mu2)
    with pytest.raises(ValueError, match="2 names, 2 sizes and 8 entries"):
        from_sums(20, 20, ["a", "b"], [3, 5], squares, g.sum(0))


def test_a_sub_sample_is_unbiased():
    """Where m Delta of the same samples is capped near m."""
    n, m = 400, 32
    g = gradients(n, 50, 2, mean=0.15)
    truth = of_matrix(g)
    generator = torch.Generator().manual_seed(0)
    parts = [g[torch.randperm(n, generator=generator)[:m]] for _ in range(4000)]
    found = [over_rows(part, n) for part in parts]
    s2 = sum(one.s2 for one in found) / len(found)
    mu2 = sum(one.mu2 for one in found) / len(found)
    assert s2 == pytest.approx(truth.s2, rel=0.01)
    assert mu2 == pytest.approx(truth.mu2, rel=0.02)
    naive = [of_matrix(part).b_s for part in parts[:200]]
    assert sum(naive) / len(naive) < 0.6 * truth.b_s


def test_an_unresolved_sub_sample_says_so():
    """Nothing is clamped: the lower estimate takes |gbar|² as it is."""
    g = gradients(40, 50, 4, mean=0.0)
    found = over_rows(g, 100_000)
    assert not found.resolved
    mean_sq = float(g.mean(0).square().sum())
    assert found.b_s == pytest.approx(1 + found.s2 / mean_sq)
    assert found.mu2 == pytest.approx(mean_sq - found.noise)


def test_noise_of_every_sample_moves_b_s_towards_n():
    """(sum|g|² + n V) / (|sum g|² + n V), Yin et al.'s mechanisms that induce diversity."""
    n, d = 500, 2000
    g = gradients(n, d, 5, mean=1.0)
    generator = torch.Generator().manual_seed(6)
    last = of_matrix(g).b_s
    for variance in (1e4, 1e6, 1e8):
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
        found = of_matrix(g + noise * (variance / d) ** 0.5)
        sum_sq, length_sq = float(g.square().sum()), float(g.sum(0).square().sum())
        predicted = n * (sum_sq + n * variance) / (length_sq + n * variance)
        assert found.b_s == pytest.approx(predicted, rel=0.08)
        assert found.b_s > last
        last = found.b_s
    assert last > 0.9 * n


def test_effective_rank():
    for count in (1, 3, 6):
        g = torch.zeros(6, 8)
        g[:, :count] = torch.eye(6)[:, :count].roll(1, 0) + 0.0
        assert effective_rank(g @ g.T) == pytest.approx(count, rel=1e-6)
    line = torch.tensor([1.0, -2.0, 3.0])[:, None] * torch.ones(1, 5)
    assert effective_rank(line @ line.T) == pytest.approx(1.0, rel=1e-6)
    uneven = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(uneven @ uneven.T) == pytest.approx(math.exp(entropy))
    assert math.isnan(effective_rank(torch.zeros(2, 2)))
    assert math.isnan(effective_rank(torch.full((2, 2), math.inf)))


@pytest.mark.parametrize(("copies", "predicted"), [(1, 668), (2, 501), (4, 334), (8, 201)])
def test_replication(copies, predicted):
    """B_S(replicated) = B_S(distinct), and its closed form (batch.md, 1.6)."""
    n, d, ratio = 2000, 2000, 1000.0
    assert replicated_b_s(ratio, n, copies) == pytest.approx(predicted, abs=1)
    generator = torch.Generator().manual_seed(7)
    distinct = torch.randn(n // copies, d, generator=generator, dtype=torch.float64)
    distinct += (1 / ratio) ** 0.5
    found = of_matrix(distinct)
    whole = of_matrix(distinct.repeat(copies, 1))
    assert whole.b_s == pytest.approx(found.b_s, rel=1e-9)
    assert found.b_s == pytest.approx(predicted, rel=0.06)
