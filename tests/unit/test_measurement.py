"""What a step's groups add up to, against NumPy, at every form and number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.control import Sums
from hpctrain.data.loader import Batch, MicroBatches
from hpctrain.errors import ConfigError
from hpctrain.forms import choose_form
from hpctrain.measurement import INSIDE_EVERY, PIECES_EVERY, Measurement
from hpctrain.models.flat import FlatModel
from hpctrain.sketches import SIZE, Sketch
from hpctrain.stats.noise import GroupSums
from hpctrain.throttle import Throttle
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import run_threads

INPUTS_ND = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS_N = torch.randn(30, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def model() -> FlatModel:
    torch.manual_seed(3)
    return FlatModel(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double())


def gradient(flat: FlatModel, chosen: slice, divisor: int) -> torch.Tensor:
    """(P,) sum of gradients over a slice of the samples, divided."""
    flat.zero_grad()
    loss = ((flat.module(INPUTS_ND[chosen]) - TARGETS_N[chosen]) ** 2).sum() / divisor
    loss.backward()
    return flat.grads_P.clone()


def expected(groups: list[slice]) -> GroupSums:
    """By definition, from every group's mean gradient."""
    flat = model()
    sizes = [g.stop - g.start for g in groups]
    means = [gradient(flat, g, n).numpy() for g, n in zip(groups, sizes, strict=True)]
    mean = sum(n * g for n, g in zip(sizes, means, strict=True)) / sum(sizes)
    weighted_sq = sum(n * g @ g for n, g in zip(sizes, means, strict=True))
    return GroupSums(len(groups), sum(sizes), weighted_sq, float(mean @ mean))


@dataclass
class Step:
    """What one rank found."""

    found: GroupSums | None
    looks: list[tuple[float, float]]


def take_step(comm: Communicator, cuts: list[int], step: int, form: Any, micro: int) -> Step:
    """Measure one step of a rank whose samples stand between two cuts."""
    flat, start, stop = model(), cuts[comm.rank], cuts[comm.rank + 1]
    measurement = Measurement(form, comm, flat, 11)
    own, total = stop - start, cuts[-1] - cuts[0]
    parts: MicroBatches | tuple[()] = ()
    if own:
        parts = MicroBatches(INPUTS_ND[start:stop], TARGETS_N[start:stop], min(micro, own))
    batch = Batch(0, total, total, own, parts, False)
    flat.zero_grad()
    for inputs, targets in measurement.begin(step, batch):
        measurement.piece(len(targets))
        (((flat.module(inputs) - targets) ** 2).sum() / total).backward()
    squares = measurement.end(batch)
    sums = np.array(
        [squares.groups, squares.weighted_sq, squares.pieces, squares.piece_weighted_sq]
    )
    comm.allreduce(sums)
    comm.allreduce(flat.grads_P.numpy())
    names = ("groups", "weighted_sq", "pieces", "piece_weighted_sq")
    told = Sums(**dict(zip(names, sums.tolist(), strict=True)))
    found = measurement.settled(told, total)
    if form == "sketch":
        measurement.settle()
        found = measurement._arrived
    return Step(found, list(measurement._looks))


@pytest.mark.parametrize("cuts", [[0, 10, 20], [0, 3, 30], [0, 8, 9, 30], [0, 10, 10, 14, 30]])
def test_ranks_are_groups(cuts):
    """Unequal shares, one of them empty."""
    steps = run_threads(len(cuts) - 1, lambda comm: take_step(comm, cuts, 1, "groups", 99))
    pairs = zip(cuts, cuts[1:], strict=False)
    wanted = expected([slice(a, b) for a, b in pairs if b > a])
    for step in steps:
        assert vars(step.found) == pytest.approx(vars(wanted), rel=1e-10)


@pytest.mark.parametrize(("micro", "cuts"), [(10, [0, 10, 20, 30]), (99, [0, 15, 30])])
def test_micro_batches_of_one_rank_are_groups(micro, cuts):
    """Several micro-batches, or a single one in two halves; on every 8th step alone."""
    (step,) = run_threads(1, lambda comm: take_step(comm, [0, 30], PIECES_EVERY, "pieces", micro))
    wanted = expected([slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)])
    assert vars(step.found) == pytest.approx(vars(wanted), rel=1e-10)
    (other,) = run_threads(1, lambda comm: take_step(comm, [0, 30], 1, "pieces", micro))
    assert other.found is None


def test_noise_inside_ranks_is_compared_with_noise_between_them():
    cuts = [0, 12, 30]
    ranks = expected([slice(0, 12), slice(12, 30)])
    pieces = expected([slice(a, a + 6) for a in range(0, 30, 6)])
    between, _ = ranks.moments()
    inside = (pieces.weighted_sq - ranks.weighted_sq) / (5 - 2)
    steps = run_threads(2, lambda comm: take_step(comm, cuts, INSIDE_EVERY, "groups", 6))
    for step in steps:
        ((found_between, found_inside),) = step.looks
        assert (found_between, found_inside) == pytest.approx((between, inside), rel=1e-9)


def test_sketches_are_unbiased_and_linear():
    flat = model()
    cuts = [0, 8, 9, 30]
    wanted = expected([slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)])
    steps = run_threads(3, lambda comm: take_step(comm, cuts, 0, "sketch", 99))
    for step in steps:  # fewer parameters than a sketch has numbers: no two share one
        assert flat.n_params < SIZE
        assert vars(step.found) == pytest.approx(vars(wanted), rel=1e-10)


@pytest.mark.parametrize(
    "vector",
    [
        torch.randn(5 * SIZE + 17, generator=torch.Generator().manual_seed(5)),
        torch.randn(64 * SIZE, generator=torch.Generator().manual_seed(6)).repeat(3)[: 150 * SIZE],
    ],
    ids=["short", "repeating"],
)
def test_a_sketch_keeps_lengths_on_average(vector):
    lengths = []
    for seed in range(200):
        whole, cut = Sketch(seed), Sketch(seed)
        whole.add(0, vector)
        middle = len(vector) - 1100
        cut.add(middle, vector[middle:])
        cut.add(0, vector[:700])
        cut.add(700, vector[700:middle])
        np.testing.assert_allclose(cut.numpy(), whole.numpy(), rtol=0, atol=1e-4)
        lengths.append(float(whole.numpy() @ whole.numpy()))
    error = np.std(lengths) / len(lengths) ** 0.5
    assert abs(np.mean(lengths) - float(vector @ vector)) < 4 * error
    assert np.std(lengths) < 2.0 * (2.0 / SIZE) ** 0.5 * float(vector @ vector)


@pytest.mark.parametrize(
    ("change", "form"),
    [
        ({}, "groups"),
        ({"measure": "off"}, "off"),
        ({"ranks": 1}, "off"),
        ({"ranks": 1, "needed": True}, "pieces"),
        ({"exact": False}, "off"),
        ({"exact": False, "measure": "on"}, "sketch"),
        ({"replicas": 2, "needed": True}, "sketch"),
        ({"replicas": 2, "own_pace": True}, "off"),
    ],
)
def test_form(change, form):
    usual: dict[str, Any] = {
        "measure": "auto",
        "needed": False,
        "exact": True,
        "ranks": 4,
        "replicas": 1,
        "own_pace": False,
    }
    assert choose_form(**usual | change) == form


def test_asynchronous_rules_are_refused():
    with pytest.raises(ConfigError, match="own pace"):
        choose_form("on", needed=True, exact=False, ranks=4, replicas=4, own_pace=True)


def test_throttle_halves_the_rate_until_the_cost_is_small():
    throttle, sums = Throttle(), Sums()
    every = []
    for _ in range(1000):
        sums = Sums(
            steps_timed=sums.steps_timed + 2,
            step_s=sums.step_s + 2.0,
            measure_s=sums.measure_s + 0.2 / throttle.every,
        )
        throttle.hear(sums, ranks=2)
        every.append(throttle.every)
    assert every[0] == 1
    assert every[-1] == 16  # 10 % at every step
    assert throttle.share < 0.01
