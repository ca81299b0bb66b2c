"""The study of replicated samples: its problems, its reading of curves, its record."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.replication import (
    COPIES,
    LeastSquares,
    N,
    b_s_on_the_way,
    crossing,
    samples_to,
    spaced,
    walk,
)

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "replication.json"


def test_a_step_sums_gradients_over_copies():
    problem = LeastSquares(4, 0)
    w = problem.start()
    rows = np.array([3, 3 + N // 4, 7])  # the first two are copies of one sample
    problem.step(w, rows, 0.01)
    g_BD = -problem.y_N[[3, 7], None] * problem.x_ND[[3, 7]]
    np.testing.assert_allclose(w, -0.01 * (2 * g_BD[0] + g_BD[1]))


def test_the_way_to_a_target():
    problem = LeastSquares(8, 1)
    target = 0.5 * problem.loss(problem.start())
    needed = samples_to(problem, 1 / 999, 16, 3, target, 1e5)
    losses = []
    for samples, w in walk(problem, 1 / 999, 16, 3):
        losses.append(problem.loss(w))
        if samples >= needed:
            break
    assert losses[-1] <= target < losses[-2]
    assert samples_to(problem, 1 / 999, 16, 3, target, needed - 64) == math.inf
    assert samples_to(problem, 1.0, 16, 3, target, 1e5) == math.inf  # diverges
    found = b_s_on_the_way(problem, 1 / 999, 16, 3, needed, 3)
    assert found[0] == problem.b_s(problem.start())
    assert len(found) == 3


def test_reading_a_curve():
    assert crossing([1, 10, 100], [1.0, 0.9, 0.7]) == pytest.approx(10 * 10**0.5)
    assert crossing([1, 10], [1.0, 0.9]) == math.inf
    assert spaced(1, 8, 32) == [1, 8, 11, 16, 23, 32]


def test_the_record_holds_the_closed_form():
    record = json.loads(RECORD.read_text())
    for copies in COPIES:
        one = record["closed_form"][str(copies)]
        assert one["measured"] == pytest.approx(one["expected"], rel=0.03)
