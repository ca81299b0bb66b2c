"""The straight line of step times: exact on a line, deaf to outliers, positive or not there."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.batch import StepTimes
from hpctrain.batch.times import MEMORY, SIZES, WINDOW, TimesFit

FIXED, PER_SAMPLE, PER_PASS = 0.02, 1e-4, 0.004


def row(batch, *, slow=1.0):
    """A step whose forward passes cost something whatever their size."""
    compute_s = (PER_PASS + PER_SAMPLE * batch) * slow
    return batch, FIXED * slow + compute_s, compute_s


def fitted(rows):
    fit = TimesFit()
    for each in rows:
        fit.add(*each)
    return fit


def test_nothing_before_the_third_step_and_then_the_one_size_rule():
    fit = TimesFit()
    assert fit.times is None
    assert fit.add(*row(128)) is None
    assert fit.add(*row(128)) is None
    line = fit.add(*row(128))
    assert line.fixed_s == pytest.approx(FIXED)
    assert line.per_sample_s == pytest.approx(PER_SAMPLE + PER_PASS / 128)
    assert line.b_half < (FIXED + PER_PASS) / PER_SAMPLE, "too small rather than too large"
    assert line.from_one_size


@pytest.mark.parametrize("batches", [(64, 256), (32, 64, 128, 512), (96, 10)])
def test_two_sizes_give_the_line_itself(batches):
    line = fitted(row(batch) for batch in batches for _ in range(5)).times
    assert line.fixed_s == pytest.approx(FIXED + PER_PASS)
    assert line.per_sample_s == pytest.approx(PER_SAMPLE)
    assert line.b_half == pytest.approx(240.0)
    assert not line.from_one_size


def test_sizes_too_near_give_no_slope():
    line = fitted(row(batch) for batch in (100, 120) for _ in range(5)).times
    assert line.fixed_s == pytest.approx(FIXED)
    assert line.per_sample_s == pytest.approx(PER_SAMPLE + PER_PASS / 120)


def test_slow_steps_now_and_then_do_not_count():
    rows = [row(b, slow=50.0 if i % 3 == 0 else 1.0) for b in (64, 256) for i in range(10)]
    assert fitted(rows).times == fitted(row(b) for b in (64, 256) for _ in range(10)).times


def test_a_line_that_is_not_positive_gives_way_to_the_latest_size():
    falling = [(64, 0.05, 0.01)] * 3 + [(256, 0.04, 0.03)] * 3
    assert fitted(falling).times == StepTimes(pytest.approx(0.01), pytest.approx(0.03 / 256), True)
    from_below = [(64, 0.001, 0.0009)] * 3 + [(256, 0.1, 0.09)] * 3
    assert fitted(from_below).times == StepTimes(
        pytest.approx(0.01), pytest.approx(0.09 / 256), True
    )
    assert fitted([(64, 0.05, 0.05)] * 3).times is None
    assert fitted([(64, 0.05, 0.06)] * 3).times is None


def test_recent_sizes_weigh_more():
    old = [(64, 0.10, 0.05)] * 16 + [(128, 0.14, 0.1)] * 16
    now = [(256, 0.15, 0.1)] * 300 + [(512, 0.25, 0.2)] * 300
    line = fitted(old + now).times
    latest = (0.25 - 0.15) / 256
    unweighted = fitted(old + now[290:310]).times
    assert abs(line.per_sample_s - latest) < abs(unweighted.per_sample_s - latest)


def test_a_size_that_no_longer_occurs_is_forgotten():
    rows = [row(64)] * 5 + [row(256)] * (MEMORY + 10)
    line = fitted(rows).times
    assert line.fixed_s == pytest.approx(FIXED)
    assert line.per_sample_s == pytest.approx(PER_SAMPLE + PER_PASS / 256)


def test_memory_is_bounded():
    fit = fitted(row(batch) for batch in range(1, 4 * SIZES) for _ in range(2 * WINDOW))
    tensor = fit.state().tensors["steps"].tensor
    assert tensor.shape == (SIZES * WINDOW, 4)
    assert not tensor.isnan().any()


SECONDS = st.one_of(st.floats(1e-6, 1e3), st.sampled_from([0.0, -1.0, math.inf, math.nan]))
ROWS = st.lists(
    st.tuples(st.sampled_from([0, 16, 64, 96, 128, 512]), SECONDS, SECONDS), max_size=60
)


@given(ROWS)
def test_both_numbers_are_positive_or_there_is_no_line(rows):
    line = fitted(rows).times
    assert line is None or (0 < line.fixed_s < math.inf and 0 < line.per_sample_s < math.inf)


@given(ROWS, ROWS)
def test_a_loaded_state_goes_on_the_same(before, after):
    whole, half = fitted(before), fitted(before)
    fresh = TimesFit()
    fresh.load_state(half.state())
    assert fresh.times == whole.times
    for each in after:
        assert fresh.add(*each) == whole.add(*each)


def test_another_number_of_ranks_starts_afresh():
    state = fitted([row(64)] * 5).state()
    assert state.tensors["steps"].resize == "reset"
    del state.tensors["steps"]
    fresh = TimesFit()
    fresh.load_state(state)
    assert fresh.times is None
