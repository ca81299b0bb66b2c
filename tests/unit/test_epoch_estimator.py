"""DiveBatch's epoch estimator: what it sums, that it telescopes, and how wrong it can be."""

from __future__ import annotations

import math

import pytest
import torch

from hpctrain.stats.diversity import of_matrix
from hpctrain.stats.epoch import EpochDiversity


class NoisyLogistic:
    """Labels drawn from a logistic model with a random w*; gradients in closed form."""

    def __init__(self, n: int, d: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x_ND = torch.randn(n, d, generator=generator, dtype=torch.float64)
        w_D = torch.randn(d, generator=generator, dtype=torch.float64) / d**0.5
        chance = torch.sigmoid(2 * self.x_ND @ w_D)
        self.y_N = torch.bernoulli(chance, generator=generator)

    def gradients(self, w_D: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        x_BD = self.x_ND[rows]
        return (torch.sigmoid(x_BD @ w_D) - self.y_N[rows])[:, None] * x_BD


def one_epoch(
    problem: NoisyLogistic, w_D: torch.Tensor, batch: int, lr: float, seed: int
) -> EpochDiversity:
    """Plain SGD over all samples once, in place."""
    estimator = EpochDiversity(len(w_D))
    order = torch.randperm(len(problem.y_N), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(batch):
        g_BD = problem.gradients(w_D, rows)
        estimator.add(float(g_BD.square().sum()), len(rows), g_BD.mean(0))
        w_D -= lr * g_BD.mean(0)
    return estimator


def test_exact_where_the_parameters_stand_still():
    g = torch.randn(30, 5, dtype=torch.float64) + 0.3
    estimator = EpochDiversity(5)
    for part in g.split(8):  # the last one is shorter
        estimator.add(float(part.square().sum()), len(part), part.mean(0))
    assert estimator.b_s() == pytest.approx(of_matrix(g).b_s, rel=1e-12)


def test_the_denominator_telescopes():
    problem = NoisyLogistic(1024, 20)
    start = torch.zeros(20, dtype=torch.float64)
    w_D, batch, lr = start.clone(), 128, 0.5
    estimator = one_epoch(problem, w_D, batch, lr, 1)
    moved = (start - w_D) * batch / lr
    torch.testing.assert_close(estimator.vec_P, moved, rtol=1e-6, atol=1e-9)


def test_the_bias_grows_with_the_step_size():
    """Wandering around the minimum: tens of times too large at a large step (batch.md, 2.4)."""
    problem = NoisyLogistic(8192, 64)
    ratios = {}
    for lr in (0.02, 2.0):
        w_D = torch.zeros(64, dtype=torch.float64)
        for epoch in range(6):
            estimator = one_epoch(problem, w_D, 128, lr, epoch)
        ratios[lr] = estimator.b_s() / of_matrix(problem.gradients(w_D, slice(None))).b_s
    assert ratios[2.0] > 10
    assert ratios[2.0] > 5 * ratios[0.02]


def test_state_and_reset():
    estimator = EpochDiversity(3)
    assert math.isnan(estimator.b_s())
    estimator.add(5.0, 2, torch.tensor([1.0, 0.0, 2.0]))
    other = EpochDiversity(3)
    other.load_state(estimator.state())
    assert other.b_s() == estimator.b_s() == pytest.approx(2 * 5.0 / 20.0)
    other.add(1.0, 2, torch.tensor([-1.0, 0.0, -2.0]))
    assert other.b_s() == math.inf
    other.reset()
    assert (other.sum_sq, other.samples, float(other.vec_P.abs().sum())) == (0.0, 0, 0.0)
    assert other.state().tensors["vec_P"].placement == "replicated"
