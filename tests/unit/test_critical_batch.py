"""The study of the critical batch and delay: known answers of its problem, and the trainer."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import critical_batch as study


@pytest.mark.parametrize("blocks", [2, 32])
def test_the_noise_of_blocked_rows_is_the_same_everywhere(blocks):
    problem = study.blocked(blocks, seed=3)
    assert problem.noise_range() == pytest.approx((31.0, 31.0))
    points = np.random.default_rng(0).standard_normal((5, study.D))
    assert problem.noise(points) == pytest.approx(31.0)
    hessian = problem.rows.T @ problem.rows / study.N
    assert np.allclose(hessian, np.diag(problem.spectrum), atol=1e-15)
    assert problem.spectrum.max() == pytest.approx(study.CONDITION * problem.spectrum.min())


def test_trajectories_follow_the_expected_loss():
    problem = study.blocked(2, seed=0)
    for batch, delay, lr in ((64, 0, 1.0), (64, 3, 0.2), (16, 8, 0.09)):
        expected = study.expected_losses(lr, 31, batch, delay, 900)
        count = int(np.flatnonzero(expected <= study.TARGET)[0])
        (found,) = study.iterations(problem, batch, delay, np.array([lr / 0.5]), seed=0)
        assert found == pytest.approx(count, rel=0.05)


def test_knees_of_the_laws_are_found():
    assert study.knee([1, 8, 64], [5 * (1 + 20 / b) for b in (1, 8, 64)], delay=False) == (
        pytest.approx(20, rel=1e-3)
    )
    assert study.knee([0, 8, 64], [5.0 * (21 + t) for t in (0, 8, 64)], delay=True) == (
        pytest.approx(20, rel=1e-3)
    )


def test_the_limit_is_where_the_expected_loss_turns():
    assert study.limit(31, 0) == pytest.approx(2 / 31)
    assert study.limit(1e-9, 100) == pytest.approx(np.pi / 200, rel=1e-3)
    limit = study.limit(400, 400)
    for factor, falls in ((0.95, True), (1.05, False)):
        losses = study.expected_losses(factor * limit, 400, 1, 400, 16000)
        assert (losses[-1] < losses[8000]) == falls


def test_the_trainer_takes_the_steps_of_the_study():
    found = study.through_hpctrain(1 / 32, batch=16, delay=5, steps=40, ranks=2)
    assert found["largest_difference"] < 1e-13
    assert found["loss"] == pytest.approx(found["loss_of_recursion"], rel=1e-12)
    assert found["loss"] < found["loss_at_start"] / 2
