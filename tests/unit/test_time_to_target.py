"""The comparison of whole trainings: its configurations load, its arithmetic is right."""

from __future__ import annotations

import pytest

from benchmarks.peers import report
from benchmarks.peers.job import Job
from benchmarks.peers.log import Log, key_of
from benchmarks.peers.target import Target
from benchmarks.peers.tasks import DENSE, SYSTEMS, TASKS
from hpctrain.config import from_mapping


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_job_has_a_configuration(task, system):
    run = from_mapping(Job(task, system, 0.1, 3, 4).tree()).run
    assert (run.seed, run.lr.base) == (3, 0.1)
    assert run.exchange.kind == SYSTEMS[system].tables.get("exchange", {}).get("kind", "dense")


def test_the_target_must_be_held_twice_in_a_row():
    target = Target.parse("accuracy:0.9")
    curve = [[25, 0.5, 0.91], [50, 0.5, 0.89], [75, 0.4, 0.9], [100, 0.4, 0.95], [125, 0.4, 0.99]]
    assert target.reached_at(curve) == 75
    assert target.reached_at(curve[:3]) is None
    assert Target.parse("loss:0.45").reached_at(curve) == 75
    with pytest.raises(ValueError, match="accuracy:VALUE or loss:VALUE"):
        Target.parse("speed:9")


def test_final_differences_are_paired_and_bounded_on_the_worse_side():
    ours = {"final": {0: [9, 0.30, 0.90], 1: [9, 0.31, 0.91], 2: [9, 0.32, 0.92]}}
    dense = {"final": {0: [9, 0.29, 0.91], 1: [9, 0.31, 0.91], 2: [9, 0.33, 0.91], 3: [9, 0, 0]}}
    found = report.compare_final(ours, dense, Target("accuracy", 0.9))
    assert found is not None
    assert found["seeds"] == [0, 1, 2]
    assert found["mean"] == pytest.approx(0.0)
    # Student's t, 2 degrees of freedom, one-sided 95 %: 2.92; standard error 0.01 / sqrt(3).
    assert found["worst_95"] == pytest.approx(-2.92 * 0.01 / 3**0.5, rel=1e-3)
    found = report.compare_final(ours, dense, Target("loss", 0.3))
    assert found is not None
    assert found["worst_95"] == pytest.approx(2.92 * 0.01 / 3**0.5, rel=1e-3)


def test_time_is_steps_times_step(tmp_path):
    log, lr = Log(tmp_path / "log"), 0.06

    def add(what: str, system: str, ranks: int, seed: int, rate: str = "", **found: object) -> None:
        job = Job("fashion", system, lr, seed, ranks)
        record = {"job": vars(job), "steps": 30, "load_average": 0.0, "curve": []} | found
        log.append(key_of(what, job, rate) | record)

    for seed, step in enumerate((400, 500)):
        add("steps", DENSE, 1, seed, curve=[[step, 0.3, 0.9], [step + 25, 0.3, 0.9]])
    add("shaped", DENSE, 4, 0, "100mbit", step_s=[2.0, 1.0, 3.0], link_bytes=[7] * 30)
    (group,) = report.summarise(log)["groups"]
    found = group["systems"][DENSE]
    assert (found["steps"], found["step_s"], found["time_s"]) == (450, 2.0, 900.0)
    assert found["reached"] == {"0.06": [400, 500]}
    assert "| Horovod float32 | 0.06 | 450 (400, 500) | 2,000 ms |" in report.table(
        report.summarise(log)
    )


def test_a_step_size_at_which_a_seed_diverged_is_not_chosen(tmp_path):
    log, system = Log(tmp_path / "log"), "hpctrain top-k 1 %, gather"
    for lr, seed, curve in ((0.1, 0, [[9, 0.3, 0.8]]), (0.2, 0, [[9, 0.2, 0.9]]), (0.2, 1, [])):
        job = Job("fashion", system, lr, seed, 4)
        log.append(key_of("final", job, "") | {"job": vars(job), "curve": curve})
    (group,) = report.summarise(log)["groups"]
    found = group["systems"][system]
    assert (found["final_lr"], found["final"]) == (0.1, {0: [9, 0.3, 0.8]})
    assert found["final_diverged"] == {"0.2": [1]}
