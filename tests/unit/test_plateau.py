"""When half the batch is tried because the loss stands still."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from hpctrain.batch.goodput import Goodput
from hpctrain.batch.guard import Guard
from hpctrain.batch.plateau import LAST, TEST, WATCHED, Plateau
from hpctrain.batch.policy import LOSSES, Seen, StepTimes
from hpctrain.stats.noise import NoiseEstimate


def losses(slope: float, seed: int = 0, count: int = WATCHED) -> list[tuple[int, float]]:
    random = np.random.default_rng(seed)
    return [(step, 1.0 + slope * step + 0.1 * random.standard_normal()) for step in range(count)]


@pytest.mark.parametrize(("slope", "stands"), [(0.0, True), (0.01, True), (-0.02, False)])
def test_a_loss_that_falls_does_not_stand(slope, stands):
    told = losses(slope)
    assert Plateau().stands(told, WATCHED, 1000) == stands
    assert not Plateau().stands(told[1:], WATCHED, 1000), "too few to say"
    assert not Plateau().stands(told, WATCHED - 1, 1000), "one of them is of another batch"


def test_not_again_before_twice_the_samples():
    plateau, told = Plateau(), losses(0.0)
    assert plateau.begin(256, told, 1000) == 128
    assert not plateau.fell(told)
    assert not plateau.stands(told, WATCHED, 1999)
    assert plateau.stands(told, WATCHED, 2000)


@pytest.mark.parametrize(("fall", "fell"), [(0.0, False), (0.05, False), (0.3, True)])
def test_verdict_by_the_noise_of_the_losses(fall, fell):
    plateau = Plateau()
    plateau.begin(256, losses(0.0), 1000)
    assert not plateau.over(losses(0.0), TEST - 1)
    assert plateau.over(losses(0.0), TEST)
    seldom = [(5 * step, loss) for step, loss in losses(0.0)]  # as replicas are told
    assert not plateau.over(seldom, TEST)
    assert plateau.over(seldom, 5 * LAST)
    assert plateau.fell([(step, loss - fall) for step, loss in losses(0.0, 1, LAST)]) == fell
    assert plateau.tested is None


def test_noise_alone_is_seldom_taken_for_a_fall():
    """In 1,000 tests without any."""
    found = 0
    for seed in range(1000):
        plateau = Plateau()
        plateau.begin(256, losses(0.0, 2 * seed), 1000)
        found += plateau.fell(losses(0.0, 2 * seed + 1, LAST))
    assert found <= 5


def test_state_round_trip():
    guard = Guard()
    guard.retreat.note(32, 128, 90.0, 300)
    guard.plateau.begin(128, losses(0.0), 1000)
    again = Guard()
    again.load_state(guard.state())
    assert again == guard


def stiff(longest: float) -> list[int]:
    """Batches that `goodput` takes in 3,000 steps of a made-up training.

    The loss falls to a floor, which is higher the more the step size is beyond `longest`.
    """
    policy = Goodput(batch_global=32, batch_max=1024).build()
    random = np.random.default_rng(3)
    times, noise = StepTimes(0.1, 1e-5), NoiseEstimate(900.0, 700.0, 1200.0, True, 900.0, 1.0, 100)
    told: list[tuple[int, float]] = []
    taken, samples = [], 0
    for step in range(1, 3000):
        batch = policy.batch
        floor = 0.5 + 0.3 * max(math.log2(0.001 * batch / longest), 0.0)
        loss = max(floor, 3.0 - samples / 10_000) + 0.05 * random.standard_normal()
        told.append((step, loss))
        samples += batch
        seen = Seen(step, samples, samples / 1e4, 10_000, 4, noise, times=times)
        policy.decide(replace(seen, losses=told[-LOSSES:]))
        taken.append(batch)
    return taken


def test_goodput_leaves_a_batch_whose_step_is_too_long():
    """The step size of 256 is borne; by B_S alone it would stay at 1,024."""
    taken = stiff(0.3)
    assert max(taken) == 1024
    assert taken.count(256) > 0.7 * len(taken)


def test_goodput_keeps_a_batch_that_only_noise_holds_up():
    taken = stiff(100.0)
    assert taken.count(1024) > 0.9 * len(taken)
    tests = sum(b < a for a, b in zip(taken, taken[1:], strict=False))
    assert 1 <= tests <= 8
