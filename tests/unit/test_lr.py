"""The step size on the sample clock, and the fixed batch."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hpctrain.batch.lr import LrConfig, adascale_gain

N = 1000
TOTAL = 10 * N


def lr(config, samples_seen, batch=50):
    return LrConfig(**config).lr_at(samples_seen, TOTAL, N, batch)


def test_constant_is_base_everywhere():
    assert {lr({"base": 0.3}, s) for s in (0, 1, 5000, TOTAL - 1, TOTAL)} == {0.3}


def test_warmup_reaches_base_with_the_steps_own_samples():
    config = {"base": 0.4, "warmup_epochs": 0.5}
    assert lr(config, 0) == pytest.approx(0.4 * 50 / 500)
    assert lr(config, 200) == pytest.approx(0.4 * 250 / 500)
    assert lr(config, 450) == lr(config, 500) == lr(config, 9000) == 0.4
    assert lr({"base": 0.4, "warmup_samples": 500}, 200) == lr(config, 200)


def test_cosine_at_known_points():
    config = {"base": 2.0, "schedule": "cosine", "final_fraction": 0.1}
    assert lr(config, 0) == 2.0
    assert lr(config, TOTAL // 2) == pytest.approx(2.0 * 0.55)
    assert lr(config, TOTAL // 3 * 1) == pytest.approx(2.0 * (0.1 + 0.9 * 0.75), rel=1e-3)
    assert lr(config, TOTAL) == pytest.approx(0.2)
    assert lr(config, 2 * TOTAL) == pytest.approx(0.2)
    warm = config | {"warmup_epochs": 2.0}
    assert lr(warm, 2 * N) == 2.0
    assert lr(warm, 6 * N) == pytest.approx(2.0 * 0.55)


def test_step_at_and_around_milestones():
    config = {"base": 1.0, "schedule": "step", "milestones": [2.5, 8.0], "gamma": 0.2}
    assert [lr(config, s) for s in (0, 2499, 2500, 7999, 8000, TOTAL)] == pytest.approx(
        [1.0, 1.0, 0.2, 0.2, 0.04, 0.04]
    )


@pytest.mark.parametrize(("kind", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_scaling_with_the_batch(kind, factor):
    config = {"kind": kind, "base": 0.1}
    if kind != "none":
        config["reference_batch"] = 32
        assert lr(config, 5000, batch=32) == 0.1
    assert lr(config, 5000, batch=128) == pytest.approx(0.1 * factor)


@given(st.floats(1.0, 1e5), st.floats(1.0, 1e5), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_adascales_gain_is_the_ratio_of_second_moments(batch, reference, s2, mu2):
    """E|g|² at the reference batch over E|g|² at the batch: the definition, with S = B / B0."""
    expected = (s2 / reference + mu2) / (s2 / batch + mu2)
    gain = adascale_gain(batch, reference, s2 / mu2)
    assert batch / reference * gain == pytest.approx(expected, rel=1e-6)


def test_adascales_gain_at_its_ends():
    assert adascale_gain(32, 32, 700.0) == 1.0
    assert adascale_gain(4096, 32, 0.0) == pytest.approx(1 / 128)
    assert adascale_gain(4096, 32, math.inf) == 1.0
    assert adascale_gain(4096, 32, 1e18) == pytest.approx(1.0)
    assert 1e12 / 32 * adascale_gain(1e12, 32, 320.0) == pytest.approx(11.0)


def test_adascale_takes_a_short_last_batch_in_proportion():
    """One gain for all steps between two looks, whatever samples they find left."""
    config = {"kind": "adascale", "base": 0.1, "reference_batch": 32}
    assert lr(config, 5000, batch=64) == pytest.approx(0.2)
    assert lr(config, 5000, batch=8) == pytest.approx(0.025)


@pytest.mark.parametrize("kind", ["none", "linear", "sqrt", "adascale", "stich"])
def test_a_gain_multiplies_every_kind(kind):
    config = {"kind": kind, "base": 0.3, "schedule": "cosine", "warmup_epochs": 0.1}
    config |= {} if kind == "none" else {"reference_batch": 32}
    config |= {"critical_batch": 50.0} if kind == "stich" else {}
    table = LrConfig(**config)
    plain = table.lr_at(5000, TOTAL, N, 64)
    assert table.lr_at(5000, TOTAL, N, 64, gain=1.0) == plain
    assert table.lr_at(5000, TOTAL, N, 64, gain=0.75) == pytest.approx(0.75 * plain)


def test_a_run_that_is_all_warmup_stays_finite():
    config = LrConfig(base=1.0, schedule="cosine", warmup_epochs=20.0)
    assert 0 < config.lr_at(0, TOTAL, N, 10) < config.lr_at(TOTAL - 10, TOTAL, N, 10) < 1


CONFIGS = st.fixed_dictionaries(
    {
        "base": st.floats(1e-6, 10.0),
        "warmup_epochs": st.floats(0.0, 9.0),
        "schedule": st.sampled_from(["constant", "cosine"]),
    }
)


@given(CONFIGS, st.integers(1, 400), st.integers(0, TOTAL), st.integers(0, TOTAL))
def test_rises_in_warmup_then_never_rises_and_stays_in_range(config, batch, s1, s2):
    early, late = sorted((s1, s2))
    end = config["warmup_epochs"] * N - batch
    first, second = lr(config, early, batch), lr(config, late, batch)
    if late <= end:
        assert first <= second
    if early >= end:
        assert first >= second * (1 - 1e-12)
    assert 0 <= first <= config["base"] * (1 + 1e-12)
    assert lr(config, 0, batch) > 0


@given(CONFIGS, st.integers(1, 400), st.integers(0, TOTAL - 1))
def test_is_continuous_in_the_clock(config, batch, samples_seen):
    """One sample moves the step size by no more than the steepest slope of any part."""
    warmup = config["warmup_epochs"] * N
    slope = 1 / max(warmup, batch) + math.pi / 2 / max(TOTAL - warmup, 1)
    change = lr(config, samples_seen + 1, batch) - lr(config, samples_seen, batch)
    assert abs(change) <= config["base"] * (slope + 1e-9)


@given(st.integers(1, 1000), st.integers(1, 1000), st.sampled_from(["linear", "sqrt"]))
def test_scaling_is_a_power_law(batch, reference, kind):
    config = {"kind": kind, "base": 0.1, "reference_batch": reference}
    power = {"linear": 1, "sqrt": 0.5}[kind]
    assert lr(config, 100, batch) == pytest.approx(0.1 * (batch / reference) ** power)


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"base": 0.0},
        {"base": 0.1, "reference_batch": 32},
        {"base": 0.1, "kind": "linear"},
        {"base": 0.1, "kind": "adascale"},
        {"base": 0.1, "kind": "adascaled", "reference_batch": 32},
        {"base": 0.1, "warmup_epochs": 1.0, "warmup_samples": 10},
        {"base": 0.1, "final_fraction": 0.1},
        {"base": 0.1, "milestones": [1.0]},
        {"base": 0.1, "schedule": "cosine", "milestones": [1.0]},
        {"base": 0.1, "schedule": "step"},
        {"base": 0.1, "schedule": "step", "milestones": [2.0, 1.0]},
        {"base": 0.1, "schedule": "step", "milestones": [0.0]},
        {"base": 0.1, "schedule": "cosine", "gamma": 0.2},
    ],
)
def test_impossible_tables_are_refused(table):
    with pytest.raises(ValidationError):
        LrConfig(**table)


def test_a_validated_table_survives_dumping():
    config = LrConfig(base=0.1, schedule="cosine", warmup_epochs=1.0)
    assert LrConfig(**config.model_dump(exclude_none=True)) == config
