"""Updates equal plain torch.optim on separate parameters; state continues bitwise."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from hpctrain.errors import ConfigError
from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import AdamW, OptimiserConfig, Sgd

TABLES = TypeAdapter(OptimiserConfig)
X = torch.randn(16, 5, generator=torch.Generator().manual_seed(2))
RATES = [0.0, 0.1, 0.02, 0.3, 0.1, 0.05]


def make(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 3)]
    return nn.Sequential(*layers).to(dtype)


def loss_of(module, step):
    return (module(X.to(module[0].weight.dtype)) - step).square().mean()


def train(config, rates, *, dtype=torch.float64, start=0, flat=None, optimiser=None):
    flat = flat or FlatModel(make(dtype))
    optimiser = optimiser or config.build(flat)
    for step, lr in enumerate(rates, start=start):
        flat.zero_grad()
        loss_of(flat.module, step).backward()
        optimiser.step(lr)
    return flat, optimiser


def decay_groups(module, weight_decay):
    """What the docstring says: only parameters of two or more dimensions decay."""
    return [
        {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


PAIRS = [
    (Sgd(), lambda m: torch.optim.SGD(m.parameters(), foreach=False)),
    (Sgd(weight_decay=0.1), lambda m: torch.optim.SGD(m.parameters(), weight_decay=0.1)),
    (Sgd(momentum=0.9), lambda m: torch.optim.SGD(m.parameters(), momentum=0.9)),
    (
        Sgd(momentum=0.8, nesterov=True, weight_decay=0.01),
        lambda m: torch.optim.SGD(m.parameters(), momentum=0.8, nesterov=True, weight_decay=0.01),
    ),
    (AdamW(weight_decay=0.0), lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.0)),
    (
        AdamW(betas=[0.8, 0.95], eps=1e-3, weight_decay=0.5),
        lambda m: torch.optim.AdamW(decay_groups(m, 0.5), betas=(0.8, 0.95), eps=1e-3),
    ),
]


@pytest.mark.parametrize(("config", "plain"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_plain_torch(config, plain, dtype):
    flat, _ = train(config, RATES, dtype=dtype)
    module = make(dtype)
    reference = plain(module)
    for step, lr in enumerate(RATES):
        reference.zero_grad()
        loss_of(module, step).backward()
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    expected = torch.cat([p.detach().flatten() for p in module.parameters()])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(flat.params_P, expected, rtol=tolerance, atol=tolerance)


def test_momentum_equals_the_written_recursion():
    flat = FlatModel(make())
    w, v = flat.params_P.clone(), torch.zeros(flat.n_params, dtype=torch.float64)
    optimiser = Sgd(momentum=0.9, nesterov=True, weight_decay=0.1).build(flat)
    for step, lr in enumerate(RATES):
        flat.zero_grad()
        loss_of(flat.module, step).backward()
        g = flat.grads_P + 0.1 * w
        v = 0.9 * v + g
        w = w - lr * (g + 0.9 * v)
        optimiser.step(lr)
        torch.testing.assert_close(flat.params_P, w, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimiser.vectors["momentum_buffer"], v)


BATCHES = [32, 32, 512, 64, 8, 128]


def test_momentum_with_a_half_life_equals_the_written_recursion():
    flat = FlatModel(make())
    w, v = flat.params_P.clone(), torch.zeros(flat.n_params, dtype=torch.float64)
    optimiser = Sgd(momentum=0.9, nesterov=True, half_life_batch=64).build(flat)
    for step, (lr, batch) in enumerate(zip(RATES, BATCHES, strict=True)):
        flat.zero_grad()
        loss_of(flat.module, step).backward()
        momentum = 0.9 ** (batch / 64)
        v = momentum * v + flat.grads_P
        w = w - lr * (flat.grads_P + momentum * v)
        optimiser.step(lr, batch)
        torch.testing.assert_close(flat.params_P, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_with_a_half_life_equals_the_written_recursion(dtype):
    """m and v are divided by the sums of the weights that their recursions give the gradients."""
    flat = FlatModel(make(dtype))
    decays_P = torch.cat(
        [torch.full((p.numel(),), float(p.ndim >= 2)) for p in flat.module.parameters()]
    )
    w = flat.params_P.double()
    m, v, weight_m, weight_v = torch.zeros_like(w), torch.zeros_like(w), 0.0, 0.0
    optimiser = AdamW(betas=[0.9, 0.99], weight_decay=0.1, half_life_batch=64).build(flat)
    for step, (lr, batch) in enumerate(zip(RATES, BATCHES, strict=True)):
        flat.zero_grad()
        loss_of(flat.module, step).backward()
        g, b1, b2 = flat.grads_P.double(), 0.9, 0.99 ** (batch / 64)
        m, weight_m = b1 * m + (1 - b1) * g, b1 * weight_m + (1 - b1)
        v, weight_v = b2 * v + (1 - b2) * g**2, b2 * weight_v + (1 - b2)
        w = w - lr * 0.1 * decays_P * w
        w = w - lr * (m / weight_m) / ((v / weight_v).sqrt() + 1e-8)
        optimiser.step(lr, batch)
        tolerance = 1e-8 if dtype == torch.float64 else 2e-4  # torch counts t in float32
        torch.testing.assert_close(flat.params_P.double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (Sgd(momentum=0.9, half_life_batch=64), Sgd(momentum=0.9)),
        (AdamW(half_life_batch=64), AdamW()),
    ],
)
def test_at_the_batch_of_the_half_life_nothing_changes(config, plain):
    flat = FlatModel(make())
    optimiser = config.build(flat)
    for step, lr in enumerate(RATES):
        flat.zero_grad()
        loss_of(flat.module, step).backward()
        optimiser.step(lr, 64)
    assert torch.equal(flat.params_P, train(plain, RATES)[0].params_P)
    with pytest.raises(ValueError, match="batch of every update"):
        optimiser.step(0.1)


@pytest.mark.parametrize(
    "config", [Sgd(momentum=0.9, half_life_batch=64), AdamW(half_life_batch=64, weight_decay=0.1)]
)
def test_a_half_life_goes_on_bitwise(config):
    def run(flat, optimiser, steps):
        for step in steps:
            flat.zero_grad()
            loss_of(flat.module, step).backward()
            optimiser.step(RATES[step], BATCHES[step])
        return flat, optimiser

    whole_flat = FlatModel(make())
    whole = run(whole_flat, config.build(whole_flat), range(6))[1]
    half_flat = FlatModel(make())
    half = run(half_flat, config.build(half_flat), range(3))[1]
    fresh_flat = FlatModel(make(seed=9))
    fresh = config.build(fresh_flat)
    fresh_flat.load_state(half_flat.state())
    fresh.load_state(half.state())
    run(fresh_flat, fresh, range(3, 6))
    assert torch.equal(fresh_flat.params_P, whole_flat.params_P)
    assert fresh.state().counters == whole.state().counters == {"steps": 6, "samples": sum(BATCHES)}


def test_a_zero_rate_changes_nothing_but_the_memory():
    flat = FlatModel(make())
    before = flat.params_P.clone()
    _, optimiser = train(AdamW(), [0.0], flat=flat)
    assert torch.equal(flat.params_P, before)
    assert optimiser.vectors["exp_avg"].abs().sum() > 0


@pytest.mark.parametrize("config", [config for config, _ in PAIRS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop", [0, 3])
def test_a_loaded_state_continues_bitwise(config, dtype, stop):
    whole, whole_optimiser = train(config, RATES, dtype=dtype)
    half, half_optimiser = train(config, RATES[:stop], dtype=dtype)
    fresh = FlatModel(make(dtype, seed=9))
    fresh_optimiser = config.build(fresh)
    fresh.load_state(half.state())
    fresh_optimiser.load_state(half_optimiser.state())
    train(config, RATES[stop:], start=stop, flat=fresh, optimiser=fresh_optimiser)
    assert torch.equal(fresh.params_P, whole.params_P)
    ours, theirs = fresh_optimiser.state(), whole_optimiser.state()
    assert ours.counters == theirs.counters
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, placed in ours.tensors.items():
        assert torch.equal(placed.tensor, theirs.tensors[name].tensor)


def test_state_is_named_by_parameter_and_replicated():
    flat, optimiser = train(AdamW(), RATES)
    state = optimiser.state()
    assert state.counters == {"steps": len(RATES)}
    assert set(state.tensors) == {
        f"{vector}.{name}" for vector in ("exp_avg", "exp_avg_sq") for name in flat.names
    }
    assert state.tensors["exp_avg.0.weight"].tensor.shape == (7, 5)
    assert {(p.placement, p.resize) for p in state.tensors.values()} == {("replicated", "keep")}
    assert train(Sgd(), RATES)[1].state().tensors == {}


def test_a_state_of_another_optimiser_is_refused():
    _, sgd = train(Sgd(momentum=0.9), RATES)
    flat = FlatModel(make())
    with pytest.raises(ConfigError, match="does not belong"):
        AdamW().build(flat).load_state(sgd.state())


@pytest.mark.parametrize("table", [Sgd, AdamW])
def test_clipping_equals_torch(table):
    reference, flat = make(), FlatModel(make())
    loss_of(reference, 3).backward()
    norm = float(nn.utils.clip_grad_norm_(reference.parameters(), 0.5))
    assert norm > 0.5
    loss_of(flat.module, 3).backward()
    assert table(clip_norm=0.5).build(flat).step(0.1) == pytest.approx(norm)
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    torch.testing.assert_close(flat.grads_P, expected, rtol=1e-5, atol=0)


def test_short_gradients_are_not_touched_and_no_clipping_gives_no_norm():
    flat = FlatModel(make())
    loss_of(flat.module, 3).backward()
    before = flat.grads_P.clone()
    assert Sgd(clip_norm=1e6).build(flat).step(0.1) == pytest.approx(float(before.norm()))
    assert torch.equal(flat.grads_P, before)
    assert Sgd().build(flat).step(0.1) is None


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "sgd", "nesterov": True},
        {"kind": "sgd", "momentum": 1.0},
        {"kind": "sgd", "half_life_batch": 64},
        {"kind": "adamw", "half_life_batch": 0},
        {"kind": "sgd", "betas": [0.9, 0.99]},
        {"kind": "adamw", "betas": [0.9]},
        {"kind": "adamw", "betas": [0.9, 1.0]},
        {"kind": "adamw", "clip_norm": 0.0},
        {"kind": "adamw", "momentum": 0.9},
        {"kind": "adam"},
    ],
)
def test_impossible_tables_are_refused(table):
    with pytest.raises(ValidationError):
        TABLES.validate_python(table)


def test_a_table_without_kind_is_sgd():
    assert TABLES.validate_python({"momentum": 0.5}) == Sgd(momentum=0.5)
