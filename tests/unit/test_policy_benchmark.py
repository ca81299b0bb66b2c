"""What `benchmarks.batch_policies` makes of its trainings and timings."""

import math
from dataclasses import replace

import pytest

from benchmarks.batch import report, tasks
from benchmarks.batch.cluster import fitted
from benchmarks.batch.runs import Case, Log, fingerprint
from benchmarks.batch.target import arrival, level
from benchmarks.batch.tasks import FIXED_START, START, TASKS, methods
from benchmarks.batch.train import train
from hpctrain.batch import StepTimes
from hpctrain.config import from_mapping

CURVE = [[0, 0, 9.0], [10, 100, 3.0], [20, 200, 1.0], [30, 300, 2.0], [40, 400, 1.0]]


def test_the_level_of_a_loss_is_its_mean_over_a_span_of_samples():
    assert level(CURVE, 100) == 1.5  # at least two evaluations
    assert level(CURVE, 300) == pytest.approx(4 / 3)
    assert level(CURVE[:1], 1e9) == math.inf


def test_a_single_good_evaluation_is_no_arrival():
    assert arrival(CURVE, 300, 1.5) == (40, 400)
    assert arrival(CURVE, 100, 1.5) == (30, 300)
    assert arrival(CURVE, 300, 1.0) is None


def test_the_line_through_exact_times_is_found(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    with pytest.raises(LookupError, match="times"):
        fitted(log, "convex")
    for batch in (32, 512, 4096):
        step_s = 0.004 + 1e-6 * batch
        for slow in (1.0, 1.0, 3.0):  # a disturbed round
            log.append(
                {"what": "times", "task": "convex", "batch": batch, "step_s": [slow * step_s]}
            )
    times = fitted(log, "convex")
    assert (times.fixed_s, times.per_sample_s) == (pytest.approx(0.004), pytest.approx(1e-6))


@pytest.mark.parametrize("task", TASKS)
def test_every_method_is_a_configuration(task):
    assert FIXED_START in methods(TASKS[task])
    for name in methods(TASKS[task]):
        for what in ("run", "final"):
            run = from_mapping(Case(what, task, name, 0, 0.1).tree()).run
            assert run.batch.largest <= tasks.CAP


def test_times_belong_to_a_training_only_where_they_are_told():
    times, other = StepTimes(1.0, 1.0), StepTimes(2.0, 1.0)
    case = Case("run", "convex", "goodput", 0, 0.1)
    assert fingerprint(case, times) != fingerprint(case, other)
    assert fingerprint(case, times) != fingerprint(replace(case, seed=1), times)


def test_the_seconds_of_a_training_are_those_of_its_steps_and_samples():
    line = {
        "task": "convex",
        "seed": 0,
        "curve": [[0, 0, 9.0, 0.1], [5, 160, 9.0, 0.1]],
        "plan": [],
    }
    found = report.of_method([line], 1.0, StepTimes(2.0, 0.5))
    assert (found["seconds"], found["reached"]) == ([2.0 * 5 + 0.5 * 160], [False])


def test_the_fastest_that_arrived_stands_for_its_kind():
    def one(family, mean_s, reached):
        return {"family": family, "mean_s": mean_s, "reached": reached}

    found = {
        FIXED_START: one("fixed", 9.0, [True, True]),
        "fixed 64": one("fixed", 5.0, [True, True]),
        "fixed 4096": one("fixed", 1.0, [True, False]),
        "AdaBatch as published": one("AdaBatch", 2.0, [True, True]),
        "AdaBatch, 5 periods": one("AdaBatch", 3.0, [False, False]),
    }
    assert report.choices(found) == {
        "start batch": FIXED_START,
        "best fixed batch": "fixed 64",
        "AdaBatch, best period": "AdaBatch, 5 periods",
        "AdaBatch as published": "AdaBatch as published",
    }


def test_a_training_on_threads_follows_the_times_it_is_told_and_stops_at_the_target():
    data = TASKS["convex"].tables["data"] | {"n_train": 2000, "n_test": 200, "features": 8}
    tree = Case("run", "convex", "goodput", 0, 0.1).tree() | {"data": data}
    found = train(tree, 4, times=StepTimes(1.0, 1e-6), target=0.5, span=200.0)
    assert found["samples_per_epoch"] == 2000
    assert arrival(found["curve"], 200.0, 0.5) is not None
    assert found["curve"][-1][1] < 30 * 2000
    batches = [decision["batch_global"] for decision in found["plan"]]
    assert batches[0] == START
    assert max(batches) > START
