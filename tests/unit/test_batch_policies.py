"""Batch policies: closed forms, bounds for any sequence of measurements, published rules."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from hpctrain.batch import BatchConfig, Fixed, Seen, StepTimes
from hpctrain.batch.adabatch import AdaBatch
from hpctrain.batch.cosine import Cosine
from hpctrain.batch.divebatch import DiveBatch
from hpctrain.batch.goodput import Goodput
from hpctrain.batch.normtest import NormTest
from hpctrain.batch.planner import best_batch, efficiency, floor_batch, goodput, ladder, scaled
from hpctrain.batch.replay import Replay
from hpctrain.batch.times import TimesFit
from hpctrain.errors import ConfigError
from hpctrain.stats.noise import GroupSums, NoiseEstimate

N = 10_000
TABLES = TypeAdapter(BatchConfig)


def noise(b_s, low=None, high=None, *, s2=1000.0):
    """A resolved estimate; without b_s one that says "at least low"."""
    if b_s is None:
        return NoiseEstimate(math.nan, low, math.inf, False, s2, -0.1, 20)
    low, high = low or b_s / 1.3, high or b_s * 1.3
    return NoiseEstimate(b_s, low, high, True, s2, s2 / (b_s - 1.0), 20)


def seen(step, *, samples=None, ranks=4, **known):
    samples = 128 * step if samples is None else samples
    return Seen(step, samples, samples / N, N, ranks, **known)


def times(b_half, per_sample_s=1e-4):
    return StepTimes(b_half * per_sample_s, per_sample_s)


def restored(table, policy):
    again = table.build()
    again.load_state(policy.state())
    return again


# What a batch is worth


@pytest.mark.parametrize(
    ("alpha", "b_s", "best"), [(32, 1001, 179), (256, 1001, 506), (512, 5001, 1600)]
)
def test_the_best_batch_has_the_largest_goodput(alpha, b_s, best):
    """Brute force over all batches; the closed form rounds to it."""
    line = StepTimes(float(alpha), 1.0)
    assert max(range(1, 4 * best), key=lambda batch: goodput(batch, b_s, line)) == best
    assert round(best_batch(b_s, line)) == best


@given(st.floats(1.1, 1e6), st.floats(1e-2, 1e5), st.floats(0.01, 100.0))
def test_a_factor_from_the_best_batch_costs_no_more_than_the_bound(b_s, b_half, c):
    line = times(b_half)
    best = best_batch(b_s, line)
    share = goodput(c * best, b_s, line) / goodput(best, b_s, line)
    assert share <= 1 + 1e-9
    if b_s > 100:
        assert share >= 4 * c / (1 + c) ** 2 - 0.02


@given(st.floats(1.0, 1e6), st.floats(1.0, 1e6))
def test_efficiency_is_adascales_gain_over_its_scale(batch, b_s):
    """r/S for base batch 1, with mu2 = 1, s2 = B_S - 1, S = batch."""
    s2, mu2 = b_s - 1.0, 1.0
    gain = (s2 + mu2) / (s2 / batch + mu2)
    assert efficiency(batch, b_s) == pytest.approx(gain / batch)


@given(st.floats(1.0, 1e6), st.floats(0.01, 0.99))
def test_the_floor_batch_has_the_efficiency_of_the_floor(b_s, floor):
    assert efficiency(floor_batch(b_s, floor), b_s) == pytest.approx(floor)


def test_rungs_are_powers_of_two_of_the_start_within_the_bounds():
    assert ladder(Goodput(batch_global=96, batch_max=1000)) == [96, 192, 384, 768]
    assert ladder(Goodput(batch_global=96, batch_min=10, batch_max=96)) == [12, 24, 48, 96]
    assert ladder(Goodput(batch_global=5, batch_min=1, batch_max=10)) == [5, 10]


def test_the_factor_scales_what_lies_above_one():
    assert scaled(101.0, 3.0) == 301.0
    assert scaled(1.0, 50.0) == 1.0
    assert scaled(math.inf, 2.0) == math.inf


# goodput


def wide(**keys):
    return Goodput(batch_global=128, batch_min=8, batch_max=4096, **keys)


def test_goodput_looks_at_once_at_the_first_resolved_estimate():
    policy = wide().build()
    assert policy.decide(seen(0)).reason == ""
    assert policy.decide(seen(3, noise=noise(2000), times=None)).reason == ""
    assert policy.decide(seen(4, noise=noise(2000), times=times(500))).batch_global == 512


def test_goodput_tells_what_is_not_known_when_it_looks():
    policy = wide().build()
    assert policy.decide(seen(10)).reason == "kept 128: the gradient noise is not known yet"
    kept = policy.decide(seen(20, noise=noise(2000)))
    assert kept.reason == "kept 128: the times of a step are not known yet"
    assert kept.facts["b_s"] == 2000


def test_goodput_reaches_the_best_rung_in_steps_of_four_and_two():
    policy = wide().build()
    grown, b_s, line = [], 5001.0, times(800)
    for step in range(1, 100):
        decision = policy.decide(seen(step, noise=noise(b_s), times=line))
        grown.append(decision.batch_global)
    assert sorted(set(grown)) == [512, 2048]  # B* = 2000
    assert grown.index(2048) == 5, "one cool-down"
    for step in range(100, 300):
        decision = policy.decide(seen(step, noise=noise(41.0), times=times(10)))
        grown.append(decision.batch_global)
    assert grown[-1] in (16, 32)  # B* = 20


def test_goodput_grows_by_a_lower_bound_and_does_not_shrink_by_one():
    policy = wide().build()
    unresolved = {"noise": noise(None, low=600.0), "times": times(2000)}
    grown = policy.decide(seen(10, **unresolved))
    assert grown.batch_global == 512
    assert "B_S is at least 600" in grown.reason
    assert grown.facts["b_s"] is None
    assert grown.facts["high"] is None
    weak = {"noise": noise(None, low=2.0), "times": times(10)}
    assert policy.decide(seen(40, **weak)).batch_global == 512


def test_goodput_keeps_where_the_low_end_gives_too_little():
    policy = wide().build()
    kept = policy.decide(seen(5, noise=noise(700, low=150, high=5000), times=times(100)))
    assert kept.batch_global == 128
    assert kept.reason.startswith("kept 128: gain ")
    assert "is below 5 %" in kept.reason
    assert kept.facts["action"] == "keep"
    assert kept.facts["gain"] < 0.05


def test_goodput_takes_the_next_smaller_rung_where_the_largest_does_not_pass():
    line = times(1000)
    estimate = noise(4000, low=150, high=9000)
    decision = wide(efficiency_floor=0.1).build().decide(seen(5, noise=estimate, times=line))
    assert decision.batch_global == 512 or decision.batch_global == 256
    gain = goodput(decision.batch_global, 150, line) / goodput(128, 150, line) - 1
    assert decision.facts["gain"] == pytest.approx(gain)
    assert gain > 0.05


def test_goodput_does_not_grow_where_nothing_is_fixed():
    """Diversity alone would say: grow. Without fixed cost larger steps only lose samples."""
    policy = wide().build()
    decision = policy.decide(seen(5, noise=noise(1e5), times=times(0.01)))
    assert decision.batch_global == 128
    assert decision.facts["b_star"] < 128


def test_goodput_shrinks_below_the_efficiency_floor_whatever_the_gain():
    policy = wide(efficiency_floor=0.8).build()
    decision = policy.decide(seen(5, noise=noise(100), times=times(1e6)))
    assert decision.batch_global == 64
    assert "less than 80 %" in decision.reason


def one_size(b_half):
    return StepTimes(b_half * 1e-4, 1e-4, from_one_size=True)


def test_goodput_tries_twice_the_batch_once_where_one_size_was_timed():
    policy, estimate = wide().build(), noise(1000)
    trial = policy.decide(seen(10, noise=estimate, times=one_size(20)))
    assert (trial.batch_global, trial.facts["action"]) == (256, "trial")
    assert trial.reason.startswith("128 -> 256: a trial")
    back = policy.decide(seen(30, noise=estimate, times=times(20)))
    assert (back.batch_global, back.facts["action"]) == (128, "shrink")
    assert back.reason.startswith("256 -> 128: nothing in reach is better")
    assert policy.decide(seen(60, noise=estimate, times=one_size(20))).batch_global == 128


def test_goodput_goes_on_from_a_trial_that_showed_more():
    policy, estimate = wide().build(), noise(5001)
    policy.decide(seen(10, noise=estimate, times=one_size(2)))
    assert policy.decide(seen(30, noise=estimate, times=times(800))).batch_global == 512  # 4 x 128


def test_goodput_grows_without_a_trial_and_tries_within_its_bounds():
    grown = wide().build().decide(seen(10, noise=noise(5001), times=one_size(800)))
    assert (grown.batch_global, grown.facts["action"]) == (512, "grow")
    narrow = Goodput(batch_global=128, batch_max=255).build()
    assert narrow.decide(seen(10, noise=noise(1000), times=one_size(2))).batch_global == 128
    kept = wide(efficiency_floor=0.9).build()
    assert kept.decide(seen(10, noise=noise(1000), times=one_size(2))).batch_global == 128


def test_goodput_finds_the_slope_that_one_size_hides():
    """A pass costs as much as 400 samples: 8 samples a rank look all compute, and are not."""
    policy, fit = Goodput(batch_global=32, batch_max=4096).build(), TimesFit()
    for step in range(200):
        known = {"noise": noise(1001), "times": fit.times} if step > 8 else {}
        batch = policy.decide(seen(step, **known)).batch_global
        fit.add(batch, 0.001 + 0.04 + 1e-4 * batch, 0.04 + 1e-4 * batch)
    assert batch in (512, 1024)  # B* = 640


def test_goodput_names_the_bound_that_holds():
    def cap(b_s, b_half, **keys):
        facts = wide(**keys).build().decide(seen(5, noise=noise(b_s), times=times(b_half))).facts
        return facts["cap"]

    assert cap(5001, 800) == "4 times"
    assert cap(31, 5000) == "efficiency_floor"
    assert cap(1e6, 1e6) == "4 times"
    assert cap(501, 32) is None
    assert cap(3.0, 2.0, efficiency_floor=0.01) == "half"
    largest = Goodput(batch_global=128, batch_max=256).build()
    decision = largest.decide(seen(5, noise=noise(5001), times=times(800)))
    assert (decision.batch_global, decision.facts["cap"]) == (256, "batch_max")


def test_the_noise_scale_factor_moves_the_best_batch_by_its_root():
    plain = wide().build().decide(seen(5, noise=noise(101), times=times(100)))
    scaled_by = wide(noise_scale_factor=25.0).build()
    decision = scaled_by.decide(seen(5, noise=noise(101), times=times(100)))
    assert plain.facts["b_star"] == pytest.approx(100.0)
    assert decision.facts["b_star"] == pytest.approx(500.0)
    assert decision.facts["b_s"] == 101, "facts are as measured"


MEASURED = st.one_of(
    st.none(),
    st.builds(
        lambda b_s, below, above: noise(b_s, b_s / below, b_s * above),
        st.floats(1.01, 1e7),
        st.floats(1.0, 50.0),
        st.floats(1.0, 50.0),
    ),
    st.builds(lambda low: noise(None, low=low), st.floats(1.0, 1e7)),
)
TIMES = st.one_of(
    st.none(),
    st.builds(times, st.floats(1e-6, 1e6), st.floats(1e-9, 1e-1)),
    st.builds(one_size, st.floats(1e-6, 1e6)),
)
LATEST = st.one_of(
    st.none(),
    st.builds(
        lambda groups, sq, excess: GroupSums(
            groups, 64.0 * groups, 64.0 * groups * sq * excess, sq
        ),
        st.integers(1, 16),
        st.floats(0.0, 1e3),
        st.floats(1.0, 100.0),
    ),
)
DIVERSITY = st.one_of(st.none(), st.floats(0.0, 1e9), st.sampled_from([math.inf, math.nan]))
SEQUENCE = st.lists(st.tuples(st.integers(1, 40), MEASURED, TIMES, LATEST, DIVERSITY), max_size=25)

BOUNDS = st.tuples(st.integers(1, 8), st.integers(1, 30), st.integers(1, 40)).map(
    lambda b: {
        "batch_min": 4 * b[0],
        "batch_global": 4 * b[0] * b[1],
        "batch_max": 4 * b[0] * b[1] * b[2],
    }
)
ADAPTIVE = [
    Goodput,
    AdaBatch,
    partial(DiveBatch, resize_every=1, rescale_lr=True),
    NormTest,
    partial(NormTest, variant="ddp", may_shrink=True),
    Cosine,
]
IDS = ["goodput", "adabatch", "divebatch", "normtest", "normtest-ddp", "cosine"]


def played(policy, sequence):
    step, samples = 0, 0
    for steps, measured, line, latest, diversity in sequence:
        step += steps
        samples += 137 * steps
        known = {"noise": measured, "times": line, "latest": latest, "epoch_diversity": diversity}
        yield policy.decide(seen(step, samples=samples, **known))


@pytest.mark.parametrize("table", ADAPTIVE, ids=IDS)
@settings(max_examples=40)
@given(bounds=BOUNDS, sequence=SEQUENCE)
def test_bounds_hold_for_any_sequence_and_equal_input_gives_equal_decisions(
    table, bounds, sequence
):
    config = table(**bounds)
    decisions = list(played(config.build(), sequence))
    again = config.build()
    for decision, other in zip(decisions, played(again, sequence), strict=True):
        assert decision == other
        assert bounds["batch_min"] <= decision.batch_global <= bounds["batch_max"]
        assert decision.batch_global >= 4
        assert 0 < decision.gain < math.inf
        json.dumps(decision.facts, allow_nan=False)


@pytest.mark.parametrize("table", ADAPTIVE, ids=IDS)
@settings(max_examples=40)
@given(bounds=BOUNDS, sequence=SEQUENCE, cut=st.integers(0, 25))
def test_a_restored_policy_decides_as_if_never_stopped(table, bounds, sequence, cut):
    config = table(**bounds)
    whole = list(played(config.build(), sequence))
    policy, step, samples = config.build(), 0, 0
    for index, (steps, measured, line, latest, diversity) in enumerate(sequence):
        if index == cut:
            policy = restored(config, policy)
        step, samples = step + steps, samples + 137 * steps
        known = {"noise": measured, "times": line, "latest": latest, "epoch_diversity": diversity}
        assert policy.decide(seen(step, samples=samples, **known)) == whole[index]


def test_a_restored_policy_stays_within_lower_bounds():
    policy = wide().build()
    policy.batch = 4096
    narrow = Goodput(batch_global=96, batch_max=400).build()
    narrow.load_state(policy.state())
    assert narrow.batch == 384


# A whole run on a model problem


def simulated_s(policy, line, *, s2=500.0, target=1e-3, limit=200_000):
    """Seconds until the squared gradient has fallen by `target`: each step gains efficiency * B."""
    mu2, seconds, samples = 20.0, 0.0, 0
    end = mu2 * target
    for step in range(limit):
        b_s = 1.0 + s2 / mu2
        known = {"noise": noise(b_s, s2=s2), "times": line} if step > 5 else {}
        batch = policy.decide(seen(step, samples=samples, **known)).batch_global
        seconds += line.fixed_s + line.per_sample_s * batch
        samples += batch
        mu2 *= math.exp(-2e-5 * batch * efficiency(batch, b_s))
        if mu2 <= end:
            return seconds
    raise AssertionError("the target was not reached")


@pytest.mark.parametrize("b_half", [30.0, 300.0, 3000.0])
def test_goodput_comes_near_the_best_fixed_batch_and_beats_the_start(b_half):
    line = times(b_half)
    fixed = {
        batch: simulated_s(Fixed(batch_global=batch).build(), line)
        for batch in (2**k for k in range(5, 14))
    }
    ours = simulated_s(Goodput(batch_global=32, batch_max=8192).build(), line)
    assert ours < 1.0 / 0.7 * min(fixed.values())
    assert ours < fixed[32]
    if b_half >= 300:
        assert ours < fixed[32] / 2


# fixed


def test_fixed_batch_never_changes():
    policy = Fixed(batch_global=96, micro_batch=16).build()
    decisions = {policy.decide(seen(s, noise=noise(9000))).batch_global for s in (0, 95, 10**9)}
    assert decisions == {96}
    assert policy.decide(seen(0)).reason == ""
    state = policy.state()
    assert (state.tensors, state.counters) == ({}, {})
    policy.load_state(state)


# adabatch


def test_adabatch_doubles_every_twenty_epochs_up_to_its_largest():
    table = AdaBatch(batch_global=128, batch_max=600)
    policy = table.build()
    told = [policy.decide(seen(0, samples=epoch * N)) for epoch in range(100)]
    assert [d.batch_global for d in told[::20]] == [128, 256, 512, 600, 600]
    assert [d.gain for d in told[::20]] == pytest.approx([1.0, 0.75, 0.75**2, 0.75**3, 0.75**3])
    assert [d.batch_global for d in told[19:21]] == [128, 256]
    reasons = [(epoch, d.reason) for epoch, d in enumerate(told) if d.reason]
    assert reasons[0] == (20, "128 -> 256: growth 1, every 20 epochs")
    assert [epoch for epoch, _ in reasons] == [20, 40, 60]


def test_adabatch_takes_parts_of_an_epoch_and_other_factors():
    policy = AdaBatch(batch_global=10, batch_max=10**6, factor=5.0, every_epochs=0.5).build()
    batches = [policy.decide(seen(0, samples=s)).batch_global for s in (0, 4999, 5000, 10_000)]
    assert batches == [10, 10, 50, 250]


# divebatch


def dived(table, diversities):
    """One decision per epoch, the diversity of the epoch before at hand."""
    policy = table.build()
    return [
        policy.decide(seen(0, samples=epoch * N, epoch_diversity=diversity))
        for epoch, diversity in enumerate([None, *diversities])
    ]


def test_divebatch_takes_delta_times_the_diversity_and_never_shrinks():
    table = DiveBatch(batch_global=128, batch_max=2048, delta=0.1, resize_every=1)
    told = dived(table, [3000.0, 1000.0, 4567.9, 1e9, 5.0])
    assert [d.batch_global for d in told] == [128, 300, 300, 456, 2048, 2048]
    assert {d.gain for d in told} == {1.0}
    assert [d.reason.split(":")[0] for d in told] == [
        "", "128 -> 300", "kept 300", "300 -> 456", "456 -> 2048", "",
    ]  # fmt: skip
    json.dumps([d.facts for d in told], allow_nan=False)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_divebatch_jumps_to_its_largest_where_diversity_is_not_finite(odd):
    table = DiveBatch(batch_global=128, batch_max=2048, resize_every=1)
    assert dived(table, [odd])[1].batch_global == 2048


def test_divebatch_resizes_every_twenty_epochs_and_says_which_it_measures():
    table = DiveBatch(batch_global=128, batch_max=2048, rescale_lr=True)
    told = dived(table, [10.0 * epoch for epoch in range(1, 65)])
    changes = {epoch: d for epoch, d in enumerate(told) if d.reason}
    assert list(changes) == [20, 40, 60]
    assert [epoch for epoch in range(64) if table.measures(epoch)] == [19, 39, 59]
    assert [d.batch_global for d in told[::20]] == [128, 128, 128, 128]
    grown = dived(DiveBatch(batch_global=128, batch_max=2048, delta=1, rescale_lr=True),
                  [600.0] * 20)  # fmt: skip
    assert (grown[20].batch_global, grown[20].gain) == (600, 600 / 128)


def test_divebatch_asks_once_per_epoch_and_tells_where_nothing_was_measured():
    policy = DiveBatch(batch_global=128, batch_max=2048, resize_every=1, delta=1).build()
    assert "was not measured" in policy.decide(seen(0, samples=N)).reason
    late = policy.decide(seen(0, samples=N + 128, epoch_diversity=500.0))
    assert (late.batch_global, late.reason) == (128, "")
    assert policy.decide(seen(0, samples=2 * N, epoch_diversity=500.0)).batch_global == 500


def test_divebatchs_estimators_need_different_things():
    assert DiveBatch(batch_max=2048).needs == {"epoch"}
    assert DiveBatch(batch_max=2048, estimator="oracle").needs == {"oracle"}


# normtest


def sums(s2, mean_sq, *, groups=4, samples=128):
    """Groups whose moments are these exactly."""
    return GroupSums(groups, samples, (groups - 1) * s2 + samples * mean_sq, mean_sq)


@settings(max_examples=20)
@given(st.floats(0.1, 0.9), st.floats(1.0, 1e4), st.floats(0.01, 10.0))
def test_normtest_settles_where_noise_is_eta_of_the_gradient(eta, s2, mu2):
    policy = NormTest(batch_global=2, batch_max=10**9, eta=eta).build()
    estimate = NoiseEstimate(1 + s2 / mu2, 1.0, math.inf, True, s2, mu2, 20)
    before = 2
    for step in range(10, 5000, 10):
        batch = policy.decide(seen(step, noise=estimate)).batch_global
        assert batch <= math.ceil(before / eta**2 + 1e-6), "one look multiplies by 1/eta² at most"
        before = batch
    settled = (1 - eta**2) / eta**2 * s2 / mu2
    if settled > 2:
        assert settled * (1 - 1e-6) - 1 <= batch <= settled + 2


def test_normtest_of_one_step_takes_byrds_next_size():
    policy = NormTest(batch_global=128, batch_max=4096, eta=0.5, variant="ddp").build()
    passed = policy.decide(seen(10, latest=sums(30.0, 1.0)))
    assert passed.batch_global == 128  # 30 / 128 < 0.25
    assert passed.reason.startswith("kept 128: test passed")
    failed = policy.decide(seen(20, latest=sums(100.0, 1.0)))
    assert failed.batch_global == 400  # 100 / (0.25 * 1)
    assert failed.reason.startswith("128 -> 400")
    assert policy.decide(seen(30, latest=sums(30.0, 1.0))).batch_global == 400
    assert policy.decide(seen(40, latest=sums(30.0, 0.0))).batch_global == 4096


def test_normtest_may_shrink_where_it_is_told_to():
    table = NormTest(batch_global=128, batch_min=16, batch_max=4096, variant="ddp", may_shrink=True)
    policy = table.build()
    assert policy.decide(seen(10, latest=sums(10.0, 1.0))).batch_global == 40
    assert policy.decide(seen(20, latest=sums(0.1, 1.0))).batch_global == 16


def test_normtest_needs_two_groups():
    for variant in ("average", "ddp"):
        policy = NormTest(batch_max=4096, variant=variant).build()
        alone = policy.decide(seen(10, latest=GroupSums(1, 128, 128.0, 1.0)))
        assert alone.reason.startswith("kept 128: no step with two groups")


def test_normtest_grows_where_the_gradient_is_not_resolved():
    estimate = NoiseEstimate(math.nan, 100.0, math.inf, False, 1000.0, -0.5, 20)
    policy = NormTest(batch_global=128, batch_max=4096, eta=0.5).build()
    assert policy.decide(seen(10, noise=estimate)).batch_global == 512


# cosine


@pytest.mark.parametrize("target", [0.5, 0.75])
def test_cosine_settles_where_two_halves_agree_as_told(target):
    table = Cosine(batch_global=32, batch_min=8, batch_max=10**6, target=target)
    policy, b_simple = table.build(), 300.0
    for step in range(10, 2000, 10):
        decision = policy.decide(seen(step, noise=noise(b_simple + 1.0)))
    settled = 2 * target / (1 - target) * b_simple
    assert settled * 0.85 < decision.batch_global < settled * 1.15
    assert decision.facts["cosine"] == pytest.approx(target, abs=0.05)


def test_cosine_moves_by_its_factors_at_every_look():
    policy = Cosine(batch_global=100, batch_min=8, batch_max=200).build()
    assert policy.decide(seen(5, noise=noise(1e4))).reason == ""
    assert policy.decide(seen(10, noise=noise(1e4))).batch_global == 110
    assert policy.decide(seen(20, noise=noise(1.5))).batch_global == 99
    unresolved = NoiseEstimate(math.nan, 10.0, math.inf, False, 1000.0, -50.0, 20)
    grown = policy.decide(seen(30, noise=unresolved))
    assert (grown.batch_global, grown.facts["cosine"]) == (109, -1.0)
    small = Cosine(batch_global=2, batch_min=1, batch_max=4).build()
    assert small.decide(seen(10, noise=noise(1e4))).batch_global == 3


# replay


def plan_of(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Replay(plan=str(path), batch_global=128)


def test_replay_follows_recorded_decisions_exactly(tmp_path):
    policy, lines, taken, samples = wide().build(), [], [], 0
    for step in range(300):
        b_s = 40.0 * 1.05 ** (step % 150)
        decision = policy.decide(
            seen(step, samples=samples, noise=noise(b_s) if step else None, times=times(300))
        )
        gain = 1.0 + decision.batch_global / 7.0
        if decision.reason or step == 0:
            lines.append(
                {"samples": samples, "batch_global": decision.batch_global, "lr_gain": gain}
                | {"reason": decision.reason, "facts": decision.facts}
            )
        taken.append((samples, decision.batch_global, gain))
        samples += decision.batch_global
    assert len({batch for _, batch, _ in taken}) > 3
    (tmp_path / "run").mkdir()
    plan_of(tmp_path / "run" / "batch_plan.jsonl", lines)
    table = Replay(plan=str(tmp_path / "run"), batch_global=128)
    replay = table.build()
    for step, (samples, batch, gain) in enumerate(taken):
        if step == 150:
            replay = restored(table, replay)
        decision = replay.decide(seen(step, samples=samples))
        assert (decision.batch_global, decision.gain) == (batch, gain)
        recorded = [line for line in lines if line["samples"] == samples]
        assert bool(decision.reason) == bool(recorded)
        if recorded and recorded[0]["reason"]:
            assert decision.reason == recorded[0]["reason"]


GOOD = {"samples": 0, "batch_global": 128, "lr_gain": 1.0}


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([], ["starts nowhere", "sample 0"]),
        ([GOOD | {"samples": 5}], ["starts at sample 5"]),
        ([GOOD, GOOD], [":2", "samples = 0 after 0", "must increase"]),
        (
            [GOOD | {"batch_global": 64}],
            ["starts with batch_global = 64", "set batch.batch_global"],
        ),
        ([GOOD | {"batch_global": 0}], [":1", "batch_global", "greater than or equal to 1"]),
        ([GOOD | {"samples": "0"}], [":1", "samples", "integer"]),
        ([GOOD | {"lr_gain": 0.0}], [":1", "lr_gain", "greater than 0"]),
        ([{"samples": 0}], [":1", "batch_global", "required"]),
        ([GOOD, [1]], [":2"]),
    ],
)
def test_what_is_no_plan_is_refused_with_its_line(tmp_path, lines, parts):
    table = plan_of(tmp_path / "plan.jsonl", lines)
    with pytest.raises(ConfigError) as caught:
        table.build()
    for part in [str(tmp_path / "plan.jsonl"), *parts]:
        assert part in str(caught.value), str(caught.value)


def test_a_missing_plan_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Replay(plan=str(tmp_path)).build()


# tables


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"batch_global": 0}, "greater than or equal to 1"),
        ({"batch_global": 8, "micro_batch": 9}, "more than batch_global = 8"),
        ({"micro_batch": 129}, "more than batch_global = 128"),
        ({"kind": "goodput"}, "batch_max"),
        ({"kind": "goodput", "batch_max": 100}, "below the start"),
        ({"kind": "goodput", "batch_max": 200, "batch_min": 129}, "above the start"),
        ({"kind": "goodput", "batch_max": 200, "micro_batch": 201}, "more than batch_max = 200"),
        ({"kind": "goodput", "batch_max": 200, "measure": "off"}, "contradict"),
        ({"kind": "goodput", "batch_max": 200, "efficiency_floor": 1.0}, "less than 1"),
        ({"kind": "adabatch", "batch_max": 200, "factor": 1.0}, "greater than 1"),
        ({"kind": "normtest", "batch_max": 200, "measure": "off"}, "contradict"),
        ({"kind": "normtest", "batch_max": 200, "eta": 1.0}, "less than 1"),
        ({"kind": "cosine", "batch_max": 200, "target": 0.0}, "greater than 0"),
        ({"kind": "cosine", "batch_max": 200, "shrink": 1.0}, "less than 1"),
        ({"kind": "divebatch", "batch_max": 200, "estimator": "exact"}, "oracle"),
        ({"kind": "divebatch", "batch_max": 200, "resize_every": 0}, "greater than or equal to 1"),
        ({"kind": "replay"}, "plan"),
        ({"kind": "nothing"}, "fixed"),
    ],
)
def test_impossible_tables_are_refused(table, message):
    with pytest.raises(ValidationError) as caught:
        TABLES.validate_python(table)
    assert message in str(caught.value)


def test_a_table_without_kind_is_fixed():
    assert TABLES.validate_python({"batch_global": 5}) == Fixed(batch_global=5)


def test_the_micro_batch_holds_for_larger_batches_too():
    assert Fixed().micro_for(4) is None
    assert Fixed(micro_batch=8).micro_for(4) == 8
    assert Goodput(batch_global=33, batch_max=999).micro_for(4) == 9
    assert Goodput(batch_global=33, batch_max=999, micro_batch=64).micro_for(4) == 64


def test_bounds_fit_the_number_of_ranks():
    Fixed(batch_global=2).require_ranks(8)
    table = Goodput(batch_global=16, batch_max=64, micro_batch=16)
    table.require_ranks(4)
    with pytest.raises(ConfigError, match=r"one micro-batch on each of 5 ranks \(5 x 16 = 80\)"):
        table.require_ranks(5)
    with pytest.raises(ConfigError, match="batch_global = 16 leaves some of 17 ranks"):
        table.require_ranks(17)
    lower = Goodput(batch_global=16, batch_min=4, batch_max=64)
    with pytest.raises(ConfigError, match="batch_min = 4 leaves some of 5 ranks"):
        lower.require_ranks(5)
