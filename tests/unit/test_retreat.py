"""When a growth of the batch is taken back."""

from __future__ import annotations

import numpy as np
import pytest

from hpctrain.batch.goodput import Goodput
from hpctrain.batch.policy import Seen, StepTimes
from hpctrain.batch.retreat import EARLIER, MENDING, PATIENCE, RECENT, Retreat
from hpctrain.stats.noise import NoiseEstimate


def grown() -> Retreat:
    retreat = Retreat()
    retreat.note(32, 128, 90.0, 300)
    retreat.note(128, 512, 400.0, 600)
    return retreat


def test_noise_below_what_the_growth_went_by():
    retreat = grown()
    assert not retreat.sank(201.0)
    assert retreat.sank(199.0)
    assert retreat.take_back(512, 1000) == 128
    assert not retreat.sank(199.0), "the growth before went by less"
    assert retreat.sank(44.0)
    assert not Retreat().sank(0.0)


def test_a_batch_is_barred_until_many_more_samples():
    retreat = grown()
    retreat.take_back(512, 1000)
    assert retreat.allows(256, 1000)
    assert not retreat.allows(512, 1000)
    assert not retreat.allows(1024, PATIENCE * 1000 - 1)
    assert retreat.allows(512, PATIENCE * 1000)
    assert not retreat.allows(1024, PATIENCE * 1000), "one after the other"
    retreat.note(128, 512, 400.0, PATIENCE * 1000)
    assert not retreat.allows(1024, PATIENCE * 1000)
    assert retreat.allows(1024, PATIENCE * PATIENCE * 1000)


@pytest.mark.parametrize(("rise", "rose"), [(0.0, False), (-0.5, False), (0.5, True)])
def test_loss_that_rose_by_more_than_its_noise(rise, rose):
    random = np.random.default_rng(5)
    before = 1.0 + 0.1 * random.standard_normal(EARLIER)
    after = 1.0 + rise + 0.1 * random.standard_normal(RECENT)
    losses = list(enumerate([*before, *after], start=1))
    assert grown().rose(losses, RECENT) == rose
    assert not Retreat().rose(losses, RECENT), "nothing to take back"
    assert not grown().rose(losses[:4], RECENT), "too few to say"


def test_loss_falls_by_chance_at_most_seldom():
    """At a constant mean over 1,000 looks."""
    random = np.random.default_rng(6)
    losses = list(enumerate(1.0 + 0.1 * random.standard_normal(10_064), start=1))
    rises = [grown().rose(losses[at : at + 64], 500) for at in range(0, 10_000, 10)]
    assert sum(rises) <= 3


def test_state_round_trip():
    retreat = grown()
    retreat.take_back(512, 1000)
    again = Retreat()
    again.load_state(retreat.state())
    assert again == retreat


def test_goodput_goes_back_bars_the_batch_and_tries_it_again():
    """Noise that a batch above 128 destroys: it stays at 128 but for one try per four-fold."""
    policy = Goodput(batch_global=32, batch_max=1024, check_every=1).build()
    times = StepTimes(fixed_s=0.1, per_sample_s=1e-4)
    taken, samples = [], 0
    for step in range(1, 2000):
        batch = policy.batch
        b_s = 500.0 if batch <= 128 else 20.0
        noise = NoiseEstimate(b_s, b_s / 1.3, b_s * 1.3, True, b_s, 1.0, 100)
        policy.decide(Seen(step, samples, samples / 1e4, 10_000, 4, noise, times=times))
        samples += policy.batch
        taken.append(policy.batch)
    assert taken.count(128) > 0.97 * len(taken)
    tries = sum(b > 128 >= a for a, b in zip(taken, taken[1:], strict=False))
    assert 2 <= tries <= 8
    assert MENDING < 2000
