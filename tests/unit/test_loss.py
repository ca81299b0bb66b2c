"""Per-sample losses against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError
from hpctrain.models.loss import per_sample_loss


class Constant(nn.Module):
    """Returns given outputs, and has a parameter of the wanted dtype."""

    def __init__(self, outputs, dtype=torch.float64):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.outputs = outputs
        self.seen = None

    def forward(self, inputs):
        self.seen = inputs
        return self.outputs + self.zero.to(self.outputs.dtype)


def test_softmax_classification():
    spec = Spec("classification", (2,), "float32", 5)
    outputs, targets = torch.randn(7, 5, dtype=torch.float64), torch.randint(5, (7,))
    loss_B, correct_B = per_sample_loss(Constant(outputs), spec, torch.ones(7, 2), targets)
    torch.testing.assert_close(loss_B, -outputs.log_softmax(1)[range(7), targets])
    assert correct_B.tolist() == (outputs.argmax(1) == targets).double().tolist()


def test_binary_classification_equals_two_logits():
    spec = Spec("classification", (2,), "float32", 2)
    logit, targets = torch.randn(9, 1, dtype=torch.float64), torch.randint(2, (9,))
    one = per_sample_loss(Constant(logit), spec, torch.ones(9, 2), targets)
    both = torch.cat([torch.zeros_like(logit), logit], 1)
    two = per_sample_loss(Constant(both), spec, torch.ones(9, 2), targets)
    torch.testing.assert_close(one, two)
    assert 0 < one[1].sum() < 9


def test_language_is_the_mean_over_the_window():
    spec = Spec("language", (6,), "int64", 11)
    outputs, targets = torch.randn(3, 6, 11, dtype=torch.float64), torch.randint(11, (3, 6))
    loss_B, correct_B = per_sample_loss(Constant(outputs), spec, targets, targets)
    for b in range(3):
        torch.testing.assert_close(loss_B[b], F.cross_entropy(outputs[b], targets[b]))
        hits = (outputs[b].argmax(-1) == targets[b]).double().mean()
        torch.testing.assert_close(correct_B[b], hits)


@pytest.mark.parametrize("n_outputs", [1, 4])
def test_regression_is_half_the_squared_distance(n_outputs):
    spec = Spec("regression", (2,), "float32", n_outputs)
    outputs, targets = torch.randn(5, n_outputs, dtype=torch.float64), torch.randn(5, n_outputs)
    loss_B, correct_B = per_sample_loss(Constant(outputs), spec, torch.ones(5, 2), targets)
    torch.testing.assert_close(loss_B, 0.5 * (outputs - targets).norm(dim=1) ** 2)
    assert loss_B.dtype == torch.float64
    assert correct_B.isnan().all()
    if n_outputs == 1:
        flat = per_sample_loss(Constant(outputs), spec, torch.ones(5, 2), targets[:, 0])
        assert torch.equal(flat[0], loss_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_parameters_even_when_outputs_are_half(dtype):
    spec = Spec("classification", (2,), "float32", 3)
    module = Constant(torch.randn(4, 3, dtype=torch.bfloat16), dtype)
    losses = per_sample_loss(module, spec, torch.ones(4, 2), torch.zeros(4, dtype=torch.long))
    assert [part.dtype for part in losses] == [dtype, dtype]
    assert module.seen.dtype == dtype
    losses[0].sum().backward()
    assert module.zero.grad is not None
    assert not losses[1].requires_grad


def test_no_samples_give_no_losses():
    """A rank may get an empty share of a step."""
    spec = Spec("classification", (2,), "float32", 3)
    linear = nn.Linear(2, 3)
    loss_B, correct_B = per_sample_loss(
        linear, spec, torch.empty(0, 2), torch.empty(0, dtype=torch.long)
    )
    assert loss_B.shape == correct_B.shape == (0,)
    loss_B.sum().backward()
    assert linear.weight.grad.abs().sum() == 0


class Own(nn.Linear):
    """Has its own loss; `answer` picks what it returns."""

    answer = "loss"

    def per_sample_loss(self, inputs, targets):
        loss_B = self(inputs).abs().sum(1) + targets
        return {
            "loss": loss_B,
            "pair": (loss_B, torch.ones(len(loss_B), requires_grad=True)),
            "mean": loss_B.mean(),
        }[self.answer]


def test_a_models_own_loss():
    spec = Spec("regression", (2,), "float32", 3)
    own, x, y = Own(2, 3), torch.randn(4, 2), torch.randn(4)
    loss_B, correct_B = per_sample_loss(own, spec, x, y)
    torch.testing.assert_close(loss_B, own(x).abs().sum(1) + y)
    assert correct_B.isnan().all()
    own.answer = "pair"
    assert per_sample_loss(own, spec, x, y)[1].tolist() == [1.0] * 4
    own.answer = "mean"
    with pytest.raises(ConfigError, match="one value per sample"):
        per_sample_loss(own, spec, x, y)


@pytest.mark.parametrize(
    ("task", "outputs", "targets"),
    [
        ("classification", torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)),
        ("classification", torch.zeros(4), torch.zeros(4, dtype=torch.long)),
        ("language", torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.long)),
        ("regression", torch.zeros(4, 1), torch.zeros(4, 3)),
    ],
)
def test_outputs_of_the_wrong_shape_are_refused(task, outputs, targets):
    spec = Spec(task, (2,), "float32", 3)
    with pytest.raises(ConfigError, match="shape"):
        per_sample_loss(Constant(outputs), spec, torch.ones(4, 2), targets)
