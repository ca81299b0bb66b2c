"""The flat vectors stay the module's parameters and gradients, whatever happens to them."""

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError
from hpctrain.models import Gpt, Resnet20
from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import AdamW


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def resnet(norm="batch"):
    return Resnet20(norm=norm).build(Spec("classification", (3, 8, 8), "float32", 4))


def is_one_vector(flat):
    """Every parameter and gradient is the right piece of the flat vectors' memory."""
    size = flat.params_P.element_size()
    return all(
        p.data_ptr() == flat.params_P.data_ptr() + where.start * size
        and p.grad.data_ptr() == flat.grads_P.data_ptr() + where.start * size
        for p, where in zip(flat.parameters, flat.slices, strict=True)
    )


def test_wrapping_keeps_values_order_and_names():
    module = small()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    flat = FlatModel(module)
    assert flat.names == list(before) == [name for name, _ in module.named_parameters()]
    for name, view in zip(flat.names, flat.views(flat.params_P), strict=True):
        assert torch.equal(view, before[name])
    assert flat.n_params == flat.params_P.numel() == flat.grads_P.numel() == 34
    assert [s.stop - s.start for s in flat.slices] == [12, 4, 4, 4, 8, 2]
    assert flat.slices[0].start == 0
    assert is_one_vector(flat)


def test_views_survive_backward_zero_grad_and_steps():
    flat = FlatModel(small())
    optimiser = AdamW().build(flat)
    reference = small()
    x = torch.randn(5, 3)
    for _ in range(3):
        flat.zero_grad()
        assert flat.grads_P.abs().sum() == 0
        flat.module(x).square().sum().backward()
        assert is_one_vector(flat)
        if torch.equal(flat.views(flat.params_P)[0], reference[0].weight):
            reference(x).square().sum().backward()
            expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
            torch.testing.assert_close(flat.grads_P, expected)
        optimiser.step(0.01)
        assert is_one_vector(flat)
    assert not torch.equal(flat.views(flat.params_P)[0], reference[0].weight)


def test_backward_passes_add_up():
    flat, x = FlatModel(small().eval()), torch.randn(6, 3)
    flat.module(x).square().sum().backward()
    whole = flat.grads_P.clone()
    flat.zero_grad()
    for part in x.split([1, 2, 3]):
        flat.module(part).square().sum().backward()
    torch.testing.assert_close(flat.grads_P, whole)
    assert flat.grad_norm() == pytest.approx(float(whole.norm()))


def test_channels_last_gradients_arrive_in_parameter_layout():
    flat, reference = FlatModel(resnet()), resnet()
    reference.load_state_dict(flat.module.state_dict())
    x = torch.randn(4, 3, 8, 8)
    flat.module(x).square().sum().backward()
    reference(x).square().sum().backward()
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    torch.testing.assert_close(flat.grads_P, expected)
    assert is_one_vector(flat)


def test_gradients_that_left_are_brought_back():
    flat, x = FlatModel(small()), torch.randn(5, 3)
    flat.module.zero_grad(set_to_none=True)
    assert not any(flat.owns_gradient(p) for p in flat.parameters)
    flat.module(x).square().sum().backward()
    strays = [p.grad for p in flat.parameters]
    for p in flat.parameters:
        flat.adopt_gradient(p)
    assert is_one_vector(flat)
    assert all(flat.owns_gradient(p) for p in flat.parameters)
    assert torch.equal(flat.grads_P, torch.cat([g.flatten() for g in strays]))
    flat.parameters[1].grad = None
    kept = flat.grads_P.clone()
    flat.attach_gradients()
    assert is_one_vector(flat)
    assert torch.equal(flat.grads_P, kept)


def test_a_tied_parameter_counts_once():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    flat, x = FlatModel(module), torch.randn(3, 4)
    assert (flat.names, flat.n_params) == (["0.weight"], 16)
    module(x).sum().backward()
    assert module[1].weight.data_ptr() == flat.params_P.data_ptr()
    assert flat.grads_P.abs().sum() > 0
    gpt = FlatModel(Gpt(d_model=8, n_head=2).build(Spec("language", (4,), "int64", 9)))
    assert [name for name, shape in zip(gpt.names, gpt.shapes, strict=True) if shape[0] == 9] == [
        "token.weight"
    ]


def test_unsuitable_modules_are_refused():
    with pytest.raises(ConfigError, match="no trainable"):
        FlatModel(nn.ReLU())
    with pytest.raises(ConfigError, match="float16"):
        FlatModel(small().half())
    mixed = small()
    mixed[3].double()
    with pytest.raises(ConfigError, match=r'"0.weight" is torch.float32.*"3.weight"'):
        FlatModel(mixed)
    mixed = small()
    mixed[3].to("meta")
    with pytest.raises(ConfigError, match="on meta"):
        FlatModel(mixed)


def test_frozen_parameters_are_left_alone_but_stored():
    module = small()
    module[0].requires_grad_(False)
    frozen = module[0].weight.data_ptr()
    flat = FlatModel(module)
    assert flat.names[0] == "1.weight"
    assert module[0].weight.data_ptr() == frozen
    assert module[0].weight.grad is None
    assert "param.0.weight" in flat.state().tensors


def trained(seed):
    flat = FlatModel(small(seed))
    flat.module(torch.randn(8, 3))
    return flat


def test_state_round_trips_bitwise():
    flat, other = trained(0), trained(1)
    stored = flat.state()
    placements = {name: (p.placement, p.resize) for name, p in stored.tensors.items()}
    assert placements["param.0.weight"] == ("replicated", "keep")
    assert placements["buffer.1.running_mean"] == ("per_rank", "mean")
    assert placements["buffer.1.num_batches_tracked"] == ("replicated", "keep")
    assert len(placements) == 6 + 3
    addresses = [p.data_ptr() for p in other.parameters]
    other.load_state(stored)
    assert addresses == [p.data_ptr() for p in other.parameters]
    assert is_one_vector(other)
    for name, placed in other.state().tensors.items():
        assert torch.equal(placed.tensor, stored.tensors[name].tensor)
        assert placed.tensor.data_ptr() != stored.tensors[name].tensor.data_ptr()


def test_buffers_that_are_not_persistent_are_not_stored():
    module = small()
    module.register_buffer("table", torch.ones(3), persistent=False)
    assert set(FlatModel(module).buffers) == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


def test_a_state_of_another_model_is_refused():
    stored = trained(0).state()
    wider = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(ConfigError, match=r"shape \(4, 3\) in the stored state and \(5, 3\)"):
        FlatModel(wider).load_state(stored)
    with pytest.raises(ConfigError, match="missing.*4.weight"):
        FlatModel(nn.Sequential(*small(), nn.Linear(2, 2))).load_state(stored)


class RootSays:
    """A rank whose root's buffers are all ones (as bytes) and arrive in call order."""

    def __init__(self, source):
        self.messages = iter(source)

    def broadcast(self, buffer, root):
        assert root == 0
        buffer[:] = next(self.messages)


def test_broadcast_takes_every_parameter_and_buffer():
    source, target = trained(0), trained(1)
    tensors = [source.params_P, *source.module.buffers()]
    messages = [t.flatten().view(torch.uint8).numpy() for t in tensors]
    target.broadcast(RootSays(messages))
    assert np.array_equal(source.params_P.numpy(), target.params_P.numpy())
    for mine, its in zip(target.module.buffers(), source.module.buffers(), strict=True):
        assert torch.equal(mine, its)
    assert is_one_vector(target)
