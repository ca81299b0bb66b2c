"""The comparison of the flagship's axes: its configurations load, its arithmetic is right."""

from __future__ import annotations

import pytest

from benchmarks.axes import report
from benchmarks.axes.cases import FIXED, FLAGSHIP, LRS, OFF, SEEDS, TRAINED, VARIANTS, Case, Log
from hpctrain.batch import StepTimes

KINDS = {
    # exchange, scope, rules, batch
    FLAGSHIP: ("topk", "group", 1, "goodput"),
    "every rank for itself": ("topk", "group", 1, "goodput"),
    "dense instead of top-k": ("dense", "group", 1, "goodput"),
    "no leaders": ("topk", "world", 0, "goodput"),
    FIXED: ("topk", "group", 1, "fixed"),
    OFF: ("dense", "world", 0, "fixed"),
}


def test_one_axis_is_off_at_a_time():
    for variant in VARIANTS:
        run = Case(variant, 0.03, 2).loaded().run
        found = (run.exchange.kind, run.exchange.scope, len(run.sync), run.batch.kind)
        assert found == KINDS[variant]
        assert (run.lr.base, run.seed) == (0.03, 2)
        assert run.exchange.kind == "dense" or run.exchange.hierarchy == (
            variant != "every rank for itself"
        )


def add(log: Log, key: dict[str, object], **found: object) -> None:
    log.once(key, lambda: dict(found))


def test_time_is_by_steps_and_samples(tmp_path):
    log = Log(tmp_path / "log")
    timing = {"rate": "100mbit", "shorter": 1, "turn": 0}
    for batch, step_s in ((256, 0.3), (1024, 0.6)):
        for variant in (FLAGSHIP, OFF):
            key = Case(variant).key("shaped") | timing | {"batch": batch}
            add(log, key, step_s=step_s * (1 if variant == FLAGSHIP else 4))
    times = report.fitted(log, FLAGSHIP, "100mbit")
    assert times is not None
    assert (times.fixed_s, times.per_sample_s) == pytest.approx((0.2, 0.1 / 256))
    assert report.fitted(log, FIXED, "100mbit") == times
    assert report.fitted(log, FLAGSHIP, "1gbit") is None
    for lr, samples in zip(LRS, (60_000, 30_000, 40_000), strict=True):
        found = {"steps": 100, "samples": samples, "batches": [[0, 256]], "curve": [[100, 1, 1, 1]]}
        add(log, Case(FLAGSHIP, lr, SEEDS[0]).key("count", *report.told(times)), **found)
    assert report.chosen_lr(log, FLAGSHIP, "100mbit") == LRS[1]
    record = report.summarise(log, "100mbit")
    found = record["variants"][FLAGSHIP]
    assert found["time_s"] == pytest.approx(100 * times.fixed_s + 30_000 * times.per_sample_s)
    assert "lr" not in record["variants"][OFF]
    assert "| flagship | 0.06 | 100 | 30,000 | 300 ms | 600 ms | 32 s | 1.00 |" in report.table(
        record
    )


def test_at_a_fixed_batch_fewest_steps_decide_before_times_are_known(tmp_path):
    log = Log(tmp_path / "log")
    for lr, steps in zip(LRS, (900, None, 700), strict=True):
        samples = None if steps is None else 256 * steps
        key = Case(OFF, lr, SEEDS[0]).key("count")
        add(log, key, steps=steps, samples=samples, batches=[], curve=[])
    assert report.chosen_lr(log, OFF, "100mbit") == LRS[2]
    assert report.chosen_lr(log, FLAGSHIP, "100mbit") is None
    assert report.seconds({"steps": 2, "samples": 5}, StepTimes(3.0, 0.1)) == pytest.approx(6.5)
    assert set(TRAINED) < set(VARIANTS)
