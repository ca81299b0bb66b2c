"""The studies of regularisers, width and depth: their arithmetic, on small cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import mechanisms, plasticity, width_depth
from benchmarks.width_depth import BATCHES, Race, Shape
from hpctrain.models.flat import FlatModel
from hpctrain.stats.diversity import of_matrix


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("depth", width_depth.DEPTHS)
def test_shapes_have_as_many_parameters(activation, depth):
    shape = Shape(depth, activation)
    assert shape.parameters == sum(w.numel() for w in shape.start(0))
    assert shape.parameters == pytest.approx(8000, rel=0.02)
    assert len(shape.sizes) == depth + 1


def test_knees_are_found_where_they_are():
    steps = [50.0 * (1 / batch + 1 / 60.0) for batch in BATCHES]
    assert width_depth.critical(steps) == pytest.approx(60.0, rel=0.01)
    # Samples are 2 (1 + 1/60) / (1 + B/60) times those at 1: twice at B = 62.
    assert width_depth.doubled(steps) == pytest.approx(62.0, rel=0.05)
    assert width_depth.critical([1 / batch for batch in BATCHES]) == math.inf
    assert width_depth.doubled([1 / batch for batch in BATCHES]) == math.inf


def test_a_race_is_plain_sgd():
    shape, data = Shape(2, "relu"), width_depth.digits()
    race = Race(shape, 16, data)
    for _ in range(3):
        race.step()
    place = len(width_depth.LRS) + 5  # seed 1
    layers = [layer.requires_grad_() for layer in shape.start(width_depth.SEEDS[1])]
    again = Race(shape, 16, data)
    for _ in range(3):
        drawn = [random.integers(width_depth.N, size=16) for random in again.random]
        outputs = shape.outputs(layers, data[0][drawn[1]])
        slopes = torch.autograd.grad(F.cross_entropy(outputs, data[1][drawn[1]]), layers)
        with torch.no_grad():
            for layer, slope in zip(layers, slopes, strict=True):
                layer -= width_depth.LRS[5] * slope
    for ours, plain in zip(race.layers, layers, strict=True):
        torch.testing.assert_close(ours[place], plain, rtol=1e-4, atol=1e-5)
    mean = width_depth.per_sample(shape, [w.detach() for w in layers], data).mean(0)
    loss = F.cross_entropy(shape.outputs(layers, data[0]), data[1])
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(loss, layers)])
    torch.testing.assert_close(mean, whole, rtol=1e-3, atol=1e-5)


def test_the_formula_of_independent_noise(monkeypatch):
    """|V_i| known: what `compare` predicts from draws is the formula, and what it measures too."""
    monkeypatch.setattr(mechanisms, "N", 64)
    random = torch.Generator().manual_seed(0)
    g_NP = torch.randn(64, 500, generator=random) + 0.4
    noisy = lambda: g_NP + 0.7 * torch.randn(64, 500, generator=random)  # noqa: E731
    found = mechanisms.compare(noisy)
    sum_v = 64 * 0.49 * 500
    sum_sq, norm_sq = float(g_NP.square().sum()), float(g_NP.sum(0).square().sum())
    assert found["predicted"] == pytest.approx(64 * (sum_sq + sum_v) / (norm_sq + sum_v), rel=0.02)
    assert found["b_s_of_means"] == pytest.approx(of_matrix(g_NP).b_s, rel=0.02)
    assert found["ratio"] == pytest.approx(1.0, abs=0.03)


def test_quantised_and_noisy_gradients_have_the_right_mean():
    g_NP = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    flat = FlatModel(nn.Linear(40, 1, bias=False))
    for draw in (mechanisms.quantised(g_NP, 2), mechanisms.langevin(flat, g_NP, 1.0)):
        mean = torch.stack([draw() for _ in range(3000)]).mean(0)
        torch.testing.assert_close(mean, g_NP, rtol=0.0, atol=0.15)


@pytest.mark.parametrize("method", plasticity.STRENGTHS)
@pytest.mark.parametrize("optimiser", plasticity.LRS)
def test_a_training_of_two_tasks(method, optimiser, monkeypatch):
    for name, value in {"TASKS": 2, "WIDTHS": [8], "PROBE": 16}.items():
        monkeypatch.setattr(plasticity, name, value)
    short = plasticity.Kind(96, 2, plasticity.over_images)
    monkeypatch.setitem(plasticity.KINDS, "labels", short)
    random = torch.Generator().manual_seed(0)
    images, labels = torch.randn(96, 784, generator=random), torch.arange(96) % 10
    strength = plasticity.STRENGTHS[method][-1]
    choice = plasticity.Choice("labels", optimiser, method, 0.003, strength)
    found = plasticity.learn(choice, 0, images, labels)
    assert {len(values) for values in found.values()} == {2}
    assert all(0.0 <= value <= 100.0 for value in found["during"] + found["end"])
    assert all(1.0 <= rank <= 16.0 for rank in found["grad_erank"])


def test_labels_are_permuted_over_images_or_as_names():
    labels = torch.arange(10).repeat(3)
    random = torch.Generator().manual_seed(0)
    over = plasticity.over_images(labels, random)
    assert torch.equal(over.bincount(), labels.bincount())
    assert not torch.equal(over[:10], over[10:20]), "an image of a digit says nothing of the next"
    names = plasticity.of_digits(labels, random)
    assert torch.equal(names[:10], names[10:20])
    assert sorted(names[:10].tolist()) == list(range(10))


def test_gains_are_taken_seed_by_seed():
    def runs(*values: float) -> dict[str, list[dict[str, list[float]]]]:
        return {"runs": [{"during": [0.0, v, v, v], "end": [0.0, v, v, v]} for v in values]}

    found = plasticity.gains({"none": runs(10.0, 20.0, 30.0), "spectral": runs(16.0, 25.0, 37.0)})
    gain = found["more_than_none"]["spectral"]["during, last 3 tasks"]
    assert gain["mean"] == pytest.approx(6.0)
    assert gain["each"] == [6.0, 5.0, 7.0]
    assert gain["half_95"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)
