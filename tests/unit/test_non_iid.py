"""The benchmark of replicas with unlike data: its cases are valid, its intervals are paired."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("scipy")

from benchmarks.non_iid import PARTS, Case
from benchmarks.non_iid_report import Runs
from hpctrain.config import from_mapping


def line(system, seed, accuracy, **more):
    case = dataclasses.asdict(Case(system, seed=seed))
    return case | ({"curve": [0.0, accuracy]} if accuracy else {"diverged": "inf"}) | more


@pytest.mark.parametrize("part", PARTS)
def test_every_case_has_a_valid_configuration(part):
    for case in PARTS[part]:
        assert from_mapping(case.tree()).run.seed == 0


def test_differences_are_paired_by_seed_and_leave_out_what_diverged():
    ours = [line("EASGD", seed, 0.5 + 0.01 * seed) for seed in (0, 1, 2, 3)]
    theirs = [line("averaging", seed, 0.4 + 0.02 * seed) for seed in (2, 1, 0)]
    runs = Runs([*ours, *theirs, line("averaging", 3, None)])
    found = runs.less(Case("EASGD"), Case("averaging"))
    # Two-sided 95 % of Student's t, 2 degrees of freedom: 4.303; standard error 1 / sqrt(3).
    assert found["seeds"] == [0, 1, 2]
    assert found["each"] == [10.0, 9.0, 8.0]
    assert found["half_95"] == pytest.approx(4.303 / 3**0.5, abs=0.01)
