"""Per-sample gradients: equal to one backward per sample, whatever the model and the chunk."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError
from hpctrain.models.cnn import Cnn
from hpctrain.models.gpt import Gpt
from hpctrain.models.logistic import Logistic
from hpctrain.models.loss import per_sample_loss
from hpctrain.models.mlp import Mlp
from hpctrain.models.resnet20 import Resnet20
from hpctrain.stats.per_sample import PerSample

VECTORS = Spec("classification", (12,), "float32", 3)
IMAGES = Spec("classification", (1, 16, 16), "float32", 4)
VALUES = Spec("regression", (12,), "float32", 2)
TOKENS = Spec("language", (6,), "int64", 11)
CASES = {
    "logistic": (Logistic(), VECTORS),
    "binary": (Logistic(), Spec("classification", (12,), "float32", 2)),
    "mlp": (Mlp(widths=[8, 8]), VECTORS),
    "regression": (Mlp(widths=[8]), VALUES),
    "cnn": (Cnn(), IMAGES),
    "resnet20": (Resnet20(), IMAGES),
    "gpt": (Gpt(n_layer=1, n_head=2, d_model=8), TOKENS),
}


def loss_for(spec: Spec):
    return lambda module, inputs, targets: per_sample_loss(module, spec, inputs, targets)[0]


def draw(spec: Spec, count: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    if spec.task == "language":
        return tuple(torch.randint(spec.n_outputs, (count, *spec.input_shape)) for _ in range(2))
    inputs = torch.randn(count, *spec.input_shape)
    if spec.task == "regression":
        return inputs, torch.randn(count, spec.n_outputs)
    return inputs, torch.randint(spec.n_outputs, (count,))


def one_by_one(module: nn.Module, loss, inputs: Tensor, targets: Tensor) -> list[list[Tensor]]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        torch.autograd.grad(loss(module, inputs[i : i + 1], targets[i : i + 1]).sum(), parameters)
        for i in range(len(inputs))
    ]


@pytest.mark.parametrize("case", CASES)
def test_equal_to_a_backward_for_each_sample(case):
    model, spec = CASES[case]
    torch.manual_seed(0)
    module = model.build(spec).double().eval()
    inputs, targets = draw(spec, 5)
    loss = loss_for(spec)
    per_sample = PerSample(module, loss)
    expected = one_by_one(module, loss, inputs, targets)
    found = per_sample.gradients(inputs, targets)
    assert list(found.parts) == [name for name, _ in module.named_parameters()] == per_sample.names
    for position, g in enumerate(found.parts.values()):
        torch.testing.assert_close(g, torch.stack([row[position] for row in expected]))
    squares_BL = torch.tensor([[float(g.square().sum()) for g in row] for row in expected])
    for chunk in (1, 2, None):
        norms_BL = per_sample.squared_norms(inputs, targets, chunk)
        assert norms_BL.dtype == torch.float64
        torch.testing.assert_close(norms_BL, squares_BL.double(), rtol=1e-6, atol=1e-12)
    flat_NP = torch.stack([torch.cat([g.flatten() for g in row]) for row in expected])
    torch.testing.assert_close(found.total(), flat_NP.sum(0))
    torch.testing.assert_close(found.products(found), flat_NP @ flat_NP.T)
    assert all(p.grad is None for p in module.parameters())


def test_chunks_bound_what_is_held():
    model, spec = CASES["mlp"]
    per_sample = PerSample(model.build(spec), loss_for(spec))
    p = sum(per_sample.sizes)
    assert (per_sample.chunk(7 * p), per_sample.chunk(p - 1)) == (7, 1)
    sizes = [len(g.squares()) for g in per_sample.chunks(*draw(spec, 7), chunk=3)]
    assert sizes == [3, 3, 1]


def test_only_trainable_parameters_and_a_tied_one_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.second.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    module = Tied().double()
    inputs, targets = torch.randn(3, 4).double(), torch.randn(3, 4).double()

    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (module(x) - y).square().sum(1)

    found = PerSample(module, loss).gradients(inputs, targets)
    assert list(found.parts) == ["first.weight", "first.bias"]
    expected = one_by_one(module, loss, inputs, targets)
    torch.testing.assert_close(found.parts["first.weight"], torch.stack([e[0] for e in expected]))


def test_the_module_keeps_its_mode_and_every_sample_its_own_mask():
    model, spec = Mlp(widths=[32], dropout=0.5), VECTORS
    module = model.build(spec)
    inputs, targets = (t[:1].expand(6, *t.shape[1:]) for t in draw(spec, 1))
    norms = PerSample(module, loss_for(spec)).squared_norms(inputs, targets).sum(1)
    assert module.training
    assert len(set(norms.tolist())) == 6
    module.eval()
    norms = PerSample(module, loss_for(spec)).squared_norms(inputs, targets).sum(1)
    assert not module.training
    torch.testing.assert_close(norms, norms[:1].expand(6))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_refused_in_either_mode(training):
    module = Resnet20(norm="batch").build(IMAGES).train(training)
    with pytest.raises(ConfigError, match=r'"norm" \(BatchNorm2d\).*not defined.*"group"'):
        PerSample(module, loss_for(IMAGES))


def test_what_cannot_be_mapped_is_said():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if float(x.sum()) > 0 else -self.linear(x)

    per_sample = PerSample(Branches(), loss_for(VECTORS))
    with pytest.raises(ConfigError, match="single samples cannot be taken.*torch says"):
        per_sample.gradients(*draw(VECTORS, 2))
    frozen = nn.Linear(12, 3).requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        PerSample(frozen, partial(loss_for(VECTORS)))
