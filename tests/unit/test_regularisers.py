"""Regularisers: their gradients against autograd, one gain however many ranks, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpctrain.api import Outcome, run_on
from hpctrain.assemble import Options, World, open_session
from hpctrain.config import from_mapping
from hpctrain.errors import ConfigError
from hpctrain.models.flat import FlatModel
from hpctrain.regularise.noise import Noise
from hpctrain.regularise.regularisers import Regulariser, Regularisers
from hpctrain.regularise.sam import Sam
from hpctrain.regularise.spectral import Spectral, iterate
from hpctrain.regularise.wasserstein import Wasserstein
from hpctrain.train import run_training
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import run_threads
from tests.golden_run import MLP, step_losses

BASE: dict[str, Any] = MLP | {
    "batch": {"batch_global": 48},
    "train": {"steps": 20, "dtype": "float64"},
    "exchange": {"kind": "dense"},
    "lr": {"base": 0.05},
}
KINDS: dict[str, dict[str, Any]] = {
    "spectral": {"kind": "spectral", "strength": 0.02},
    "wasserstein": {"kind": "wasserstein", "strength": 20.0},
    "noise": {"kind": "noise", "variance": 2.0},
    "noise per step": {"kind": "noise", "variance": 0.1, "per": "step", "decay": 0.55},
}


def train(tree: dict[str, Any], size: int, folder: Path, **options: Any) -> list[Outcome]:
    loaded = from_mapping(tree)
    return run_threads(
        size, lambda comm: run_on(World(comm), loaded, Options(out=folder, **options))
    )


def make_flat() -> FlatModel:
    """A matrix, kernels, norms with scale and shift, and biases; no value at its start."""
    torch.manual_seed(3)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 2, groups=2, bias=False),
        nn.Flatten(),
        nn.LayerNorm(6),
        nn.Linear(6, 5),
    ).double()
    flat = FlatModel(module)
    flat.params_P.add_(0.3 * torch.randn_like(flat.params_P))
    return flat


def added_by(regulariser: Regulariser, flat: FlatModel, step: int = 0, samples: int = 1) -> Tensor:
    flat.zero_grad()
    regulariser.adjust_gradient(step, samples)
    return flat.grads_P.clone()


def spectral_penalty(flat: FlatModel, params_P: Tensor, k: int) -> Tensor:
    """R by singular values."""
    total = params_P.new_zeros(())
    for name, w in zip(flat.names, flat.views(params_P), strict=True):
        if w.ndim > 1:
            total = total + (torch.linalg.svdvals(w.flatten(1))[0] ** k - 1) ** 2
        elif name in ("1.weight", "4.weight"):
            total = total + ((w.abs() ** k - 1) ** 2).sum()
        else:
            total = total + torch.linalg.vector_norm(w) ** (2 * k)
    return total


@pytest.mark.parametrize("k", [1, 2, 3])
def test_spectral_is_the_gradient_by_singular_values(k):
    flat = make_flat()
    running = Spectral(strength=0.7, power=k).build(flat, 0)
    for _ in range(300):
        added = added_by(running, flat)
    params_P = flat.params_P.clone().requires_grad_()
    penalty = 0.7 * spectral_penalty(flat, params_P, k)
    (expected,) = torch.autograd.grad(penalty, params_P)
    torch.testing.assert_close(added, expected, rtol=1e-9, atol=1e-10)
    assert running.tally()["penalty"] == pytest.approx(penalty.item(), rel=1e-12)
    largest = max(
        float(torch.linalg.svdvals(w.flatten(1))[0])
        for w in flat.views(flat.params_P)
        if w.ndim > 1
    )
    assert running.tally()["sigma_max"] == pytest.approx(largest, rel=1e-12)


def test_spectral_adds_to_what_is_there():
    flat = make_flat()
    first = added_by(Spectral(strength=0.7).build(flat, 0), flat)
    flat.grads_P.fill_(2.0)
    Spectral(strength=0.7).build(flat, 0).adjust_gradient(0, 1)
    torch.testing.assert_close(flat.grads_P, first + 2.0)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([1e-20, 1.0, 1e20])
)
def test_power_iteration_rises_to_the_largest_singular_value(rows, columns, seed, scale):
    random = torch.Generator().manual_seed(seed)
    w_RC = scale * torch.randn(rows, columns, generator=random, dtype=torch.float64)
    u_R = torch.randn(rows, generator=random, dtype=torch.float64)
    sigmas = [float(iterate(w_RC, u_R)[0]) for _ in range(200)]
    assert float(torch.linalg.vector_norm(u_R)) == pytest.approx(1.0)
    largest = float(torch.linalg.svdvals(w_RC)[0])
    assert all(a <= b * (1 + 1e-12) for a, b in zip(sigmas, sigmas[1:], strict=False))
    assert sigmas[-1] <= largest * (1 + 1e-12)
    assert sigmas[-1] == pytest.approx(largest, rel=0.02)


def test_a_zero_matrix_is_left_alone_and_found_when_it_grows():
    u_R = torch.tensor([0.6, 0.8], dtype=torch.float64)
    w_RC = torch.zeros(2, 3, dtype=torch.float64)
    assert float(iterate(w_RC, u_R)[0]) == 0.0
    assert u_R.tolist() == [0.6, 0.8]
    w_RC[0, 1] = 5.0
    assert float(iterate(w_RC, u_R)[0]) == pytest.approx(5.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_wasserstein_is_zero_at_every_permutation_of_the_initial_values(seed):
    flat = make_flat()
    running = Wasserstein(strength=3.0).build(flat, 0)
    random = torch.Generator().manual_seed(seed)
    for where in flat.slices:
        values = flat.params_P[where]
        flat.params_P[where] = values[torch.randperm(len(values), generator=random)]
    assert not added_by(running, flat).any()
    assert running.tally() == {"penalty": 0.0}


def test_wasserstein_is_the_gradient_of_the_distance_of_sorted_values():
    flat = make_flat()
    running = Wasserstein(strength=3.0).build(flat, 0)
    initial = [view.flatten().sort().values for view in flat.views(flat.params_P.clone())]
    flat.params_P.add_(0.5 * torch.randn_like(flat.params_P)).mul_(1.3)
    params_P = flat.params_P.clone().requires_grad_()
    pairs = zip(flat.views(params_P), initial, strict=True)
    penalty = 3.0 * sum((w.flatten().sort().values - w0).square().mean() for w, w0 in pairs)
    assert isinstance(penalty, Tensor)
    (expected,) = torch.autograd.grad(penalty, params_P)
    torch.testing.assert_close(added_by(running, flat), expected, rtol=1e-12, atol=1e-12)
    assert running.tally()["penalty"] == pytest.approx(penalty.item(), rel=1e-12)


def test_wasserstein_of_a_shift_is_its_square():
    """All values of a layer moved by c: W2² = c²."""
    flat = make_flat()
    running = Wasserstein(strength=1.0).build(flat, 0)
    flat.params_P.add_(0.25)
    added_by(running, flat)
    assert running.tally()["penalty"] == pytest.approx(0.25**2 * len(flat.names))


@pytest.mark.parametrize(
    ("config", "samples", "step", "expected"),
    [
        (Noise(variance=3.0), 1, 0, 3.0),
        (Noise(variance=3.0), 12, 5, 0.25),
        (Noise(variance=3.0, per="step"), 12, 5, 3.0),
        (Noise(variance=3.0, per="step", decay=0.5), 12, 8, 1.0),
    ],
)
def test_noise_has_the_given_length(config, samples, step, expected):
    flat = FlatModel(nn.Linear(200, 200, dtype=torch.float64))
    running = config.build(flat, 4)
    noise = added_by(running, flat, step, samples)
    # The squared length of normal noise in P dimensions varies by sqrt(2 / P) of itself.
    assert float(noise.square().sum()) == pytest.approx(expected, rel=5 * (2 / len(noise)) ** 0.5)
    assert abs(float(noise.mean())) < 5 * (expected / len(noise)) ** 0.5 / len(noise) ** 0.5
    assert running.tally() == {"variance": pytest.approx(expected)}


def test_noise_follows_from_seed_and_step_and_is_apart_from_that_of_sam():
    flat = FlatModel(nn.Linear(100, 100, bias=False, dtype=torch.float64))
    noise = [added_by(Noise(variance=1.0).build(flat, seed), flat, step) for seed, step in
             [(0, 0), (0, 0), (0, 1), (1, 0)]]  # fmt: skip
    assert torch.equal(noise[0], noise[1])
    start_P = flat.params_P.clone()
    sam = Sam(form="average", rho=1.0).build(flat, 0)
    sam.perturb(0, lambda: None)
    others = [*noise[2:], flat.params_P - start_P]
    for other in others:
        cosine = torch.cosine_similarity(noise[0], other, dim=0)
        assert abs(float(cosine)) < 0.05


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_counts_once_however_many_ranks(name, size, tmp_path):
    tree = BASE | {"regulariser": [KINDS[name]]}
    one = train(tree, 1, tmp_path / "one")[0].results["loss"]
    micro = BASE["batch"] | {"micro_batch": 5}
    many = train(tree | {"batch": micro}, size, tmp_path / "many")[0].results["loss"]
    assert many == pytest.approx(one, rel=1e-12)
    plain = train(BASE, 1, tmp_path / "plain")[0].results["loss"]
    assert abs(one - plain) > 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_resumes_bitwise(name, tmp_path):
    tree = BASE | {"regulariser": [KINDS[name], {"kind": "sam", "form": "average"}]}
    whole = train(tree, 2, tmp_path / "whole")[0].results
    train(tree | {"train": {"steps": 9, "dtype": "float64"}}, 2, tmp_path / "parts")
    assert train(tree, 2, tmp_path / "parts", resume="auto")[0].results == whole


def test_goes_on_with_other_ranks(tmp_path):
    kinds = [KINDS["spectral"], KINDS["wasserstein"], KINDS["noise"]]
    tree = BASE | {"regulariser": kinds}
    whole = train(tree, 2, tmp_path / "whole")[0].results["loss"]
    train(tree | {"train": {"steps": 9, "dtype": "float64"}}, 2, tmp_path / "parts")
    again = train(tree, 3, tmp_path / "parts", resume="auto")[0].results["loss"]
    assert again == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("node_of", [[0, 1], [0, 0, 1, 1]], ids=str)
def test_replicas_resume_bitwise(node_of, tmp_path):
    """Each replica has vectors of its own; averaged, they serve another number of replicas."""
    kinds = [KINDS["spectral"], KINDS["noise"]]
    exchange = {"kind": "dense", "scope": "node", "dense_backend": "mpi"}
    sync = [{"kind": "average", "every": 4}]
    tree = BASE | {"regulariser": kinds, "exchange": exchange, "sync": sync}
    short = tree | {"train": {"steps": 10, "dtype": "float64"}}

    def run(tree: dict[str, Any], folder: str, **options: Any) -> dict[str, float]:
        loaded = from_mapping(tree)
        done = run_threads(
            len(node_of),
            lambda comm: run_on(World(comm), loaded, Options(out=tmp_path / folder, **options)),
            node_of=node_of,
        )
        return done[0].results

    whole = run(tree, "whole")
    run(short, "parts")
    assert run(tree, "parts", resume="auto") == whole
    run(short, "fewer")
    assert train(tree, 1, tmp_path / "fewer", resume="auto")[0].results["accuracy"] > 0.3


def test_the_exchange_sees_the_gradient_of_the_data_alone(tmp_path):
    """What is measured on the way is free of penalties and noise: they come after `settle`."""

    def first_gradient(comm: Communicator, regulariser: list[dict[str, Any]], folder: Path) -> Any:
        loaded = from_mapping(BASE | {"regulariser": regulariser, "train": {"steps": 1}})
        with open_session(loaded, World(comm), Options(out=folder)) as session:
            settle, seen = session.exchange.settle, []

            def spy(*, keep: bool) -> None:
                settle(keep=keep)
                seen.append(session.flat.grads_P.clone())

            session.exchange.settle = spy  # type: ignore[method-assign]
            run_training(session)
            return seen[0], session.flat.grads_P.clone()

    kinds = [KINDS["spectral"], KINDS["wasserstein"], KINDS["noise"]]
    (plain, _), *_ = run_threads(2, lambda comm: first_gradient(comm, [], tmp_path / "plain"))
    (data, whole), *_ = run_threads(
        2, lambda comm: first_gradient(comm, kinds, tmp_path / "regularised")
    )
    assert torch.equal(plain, data)
    assert not torch.equal(data, whole)


def test_spectral_draws_singular_values_to_one(tmp_path):
    tree = BASE | {"regulariser": [{"kind": "spectral", "strength": 1.0}]}
    tree |= {"train": {"steps": 150, "dtype": "float64"}, "lr": {"base": 0.02}}
    train(tree, 1, tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    steps = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "step"]
    first, last = steps[0]["regulariser"], steps[-1]["regulariser"]
    assert last["spectral.sigma_max"] == pytest.approx(1.0, abs=0.2)
    assert last["spectral.penalty"] < 0.2 * first["spectral.penalty"]
    losses = step_losses(tmp_path / "run")
    assert losses[-1] < 0.8 * losses[0]


def test_a_linear_model_that_starts_at_zero(tmp_path):
    tree = BASE | {"model": {"kind": "logistic"}, "regulariser": [KINDS["spectral"]]}
    results = train(tree, 2, tmp_path / "run")[0].results
    assert results["accuracy"] > 0.8


@pytest.mark.parametrize("gives", ["gradient", "update"])
@pytest.mark.parametrize("name", ["spectral", "wasserstein", "noise"])
def test_needs_an_exchange_that_gives_the_gradient(name, gives):
    exchange = {"kind": "topk", "gives": gives}
    tree = BASE | {"exchange": exchange, "train": {"steps": 3}, "regulariser": [KINDS[name]]}
    if gives == "gradient":
        assert from_mapping(tree).run.regulariser[0].kind == name
        return
    with pytest.raises(ConfigError, match='set exchange.gives = "gradient"'):
        from_mapping(tree)


def test_sam_goes_with_any_exchange():
    tree = BASE | {"exchange": {"kind": "topk"}, "train": {"steps": 3}}
    assert from_mapping(tree | {"regulariser": [{"kind": "sam"}]}).run.regulariser[0] == Sam()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([KINDS["noise"], KINDS["noise per step"]], "stands 2 times"),
        ([{"kind": "spectrl"}], 'did you mean "spectral"'),
        ([{"kind": "spectral", "streng": 1.0}], "unknown key regulariser.0.streng"),
        ([{"strength": 1.0}], "regulariser.0.kind is missing"),
        ([{"kind": "noise"}], "regulariser.0.variance is missing"),
        ([{"kind": "noise", "variance": 0.0}], "greater than 0"),
    ],
)
def test_refusals(tables, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(BASE | {"regulariser": tables})


def test_a_state_of_another_model_is_refused():
    flat, other = make_flat(), FlatModel(nn.Linear(3, 2, dtype=torch.float64))
    for config in (Spectral(), Wasserstein()):
        stored = Regularisers([(config.kind, config.build(flat, 0))]).state()
        running = Regularisers([(config.kind, config.build(other, 0))])
        with pytest.raises(ConfigError, match="Resume with"):
            running.load_state(stored)
