"""Every built-in model: sizes, shapes, fit with the data, dependence on the seed only."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError
from hpctrain.models import ModelConfig

MODELS = TypeAdapter(ModelConfig)
VECTOR2 = Spec("classification", (7,), "float32", 2)
VECTOR5 = Spec("classification", (7,), "float32", 5)
TARGET3 = Spec("regression", (7,), "float32", 3)
DIGITS = Spec("classification", (1, 8, 8), "float32", 10)
FASHION = Spec("classification", (1, 28, 28), "float32", 10)
CIFAR = Spec("classification", (3, 32, 32), "float32", 10)
TEXT = Spec("language", (16,), "int64", 65)

SMALL_GPT = {"kind": "gpt", "n_layer": 2, "n_head": 2, "d_model": 32}
GPT_PARAMS = 65 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32
BUILDS = [
    ({"kind": "logistic"}, VECTOR2, (1,), 7 + 1),
    ({"kind": "logistic", "bias": False}, VECTOR2, (1,), 7),
    ({"kind": "logistic"}, VECTOR5, (5,), 7 * 5 + 5),
    ({"kind": "logistic"}, TARGET3, (3,), 7 * 3 + 3),
    ({"kind": "logistic"}, DIGITS, (10,), 64 * 10 + 10),
    ({"kind": "mlp", "widths": [6, 4]}, VECTOR5, (5,), 8 * 6 + 7 * 4 + 5 * 5),
    ({"kind": "mlp", "activation": "tanh", "dropout": 0.1}, TARGET3, (3,), 8 * 128 + 129 * 3),
    ({"kind": "cnn"}, DIGITS, (10,), 160 + 4640 + 129 * 64 + 650),
    ({"kind": "cnn", "channels": [4, 4, 4], "hidden": 8}, FASHION, (10,), 40 + 296 + 37 * 8 + 90),
    ({"kind": "cnn", "dropout": 0.5}, CIFAR, (10,), 448 + 4640 + 2049 * 64 + 650),
    ({"kind": "resnet20"}, CIFAR, (10,), 269_722),
    ({"kind": "resnet20", "norm": "batch"}, CIFAR, (10,), 269_722),
    (SMALL_GPT, TEXT, (16, 65), GPT_PARAMS),
]


def build(config, spec, seed=0):
    torch.manual_seed(seed)
    return MODELS.validate_python(config).build(spec)


def inputs_for(spec, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if spec.task == "language":
        return torch.randint(spec.n_outputs, (n, *spec.input_shape), generator=generator)
    return torch.randn(n, *spec.input_shape, generator=generator)


@pytest.mark.parametrize(("config", "spec", "output_shape", "n_params"), BUILDS)
def test_size_and_output_shape(config, spec, output_shape, n_params):
    module = build(config, spec)
    assert sum(p.numel() for p in module.parameters()) == n_params
    assert module(inputs_for(spec, 3)).shape == (3, *output_shape)


@pytest.mark.parametrize(("config", "spec"), [row[:2] for row in BUILDS])
def test_the_seed_alone_decides_and_float64_starts_from_the_same_point(config, spec):
    first, again, other = build(config, spec), build(config, spec), build(config, spec, seed=5)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    if config["kind"] != "logistic":
        pairs = zip(first.parameters(), other.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)
    first.eval(), again.eval()
    x = inputs_for(spec, 4)
    double = x.double() if x.is_floating_point() else x
    torch.testing.assert_close(again.double()(double).float(), first(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("config", "spec"), [row[:2] for row in BUILDS if "dropout" not in row[0]])
def test_a_sample_does_not_see_its_neighbours(config, spec):
    """Except under batch normalisation: else results would depend on the number of ranks."""
    module = build(config, spec).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    x = inputs_for(spec, 4)
    x = x.double() if x.is_floating_point() else x
    together, alone = module(x), torch.cat([module(x[:1]), module(x[1:])])
    assert torch.allclose(together, alone, rtol=1e-9) == (config.get("norm") != "batch")


def test_gpt_is_causal():
    module = build(SMALL_GPT, TEXT).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    x = inputs_for(TEXT, 2)
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 65
    before, after = module(x), module(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-12, atol=1e-12)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-6
    torch.testing.assert_close(module(x[:, :5]), before[:, :5], rtol=1e-9, atol=1e-12)


def test_gpt_attention_is_the_textbook_one():
    module = build(SMALL_GPT, TEXT).double()
    layer = module.layers[0]
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    query, key, value = layer.qkv(layer.norm1(x)).view(2, 16, 3, 2, 16).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 16**0.5
    scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    heads = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).reshape(2, 16, 32)
    x2 = x + heads @ layer.attention_out.weight.T
    hidden = nn.functional.gelu(layer.norm2(x2) @ layer.mlp_in.weight.T)
    torch.testing.assert_close(layer(x), x2 + hidden @ layer.mlp_out.weight.T)


def test_gpt_starts_near_uniform_with_a_tied_head():
    module = build({"kind": "gpt"}, Spec("language", (64,), "int64", 65))
    logits = module(torch.randint(65, (4, 64)))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(65, (4 * 64,)))
    assert abs(loss.item() - 4.174) < 0.1
    assert [n for n, p in module.named_parameters() if p.shape[0] == 65] == ["token.weight"]


def test_resnet20_shortcut_pads_with_zero_channels():
    module = build({"kind": "resnet20"}, CIFAR).eval()
    block = module.blocks[3]
    for p in block.norm2.parameters():
        nn.init.zeros_(p)
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert y.shape == (2, 32, 4, 4)
    torch.testing.assert_close(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().max() == 0
    assert y[:, 24:].abs().max() == 0


def test_images_are_laid_out_channels_last():
    module = build({"kind": "cnn"}, FASHION)
    x = inputs_for(FASHION, 2)
    laid_out = module.layout(x)
    assert torch.equal(laid_out, x)
    assert laid_out.stride() == (28 * 28, 1, 28, 1)
    three = inputs_for(CIFAR, 2)
    assert torch.equal(module.layout(three), three)
    assert module.layout(three).is_contiguous(memory_format=torch.channels_last)


def test_convolutional_models_work_under_vmap():
    """Per-sample gradients are taken through vmap."""
    module = build({"kind": "resnet20"}, CIFAR)
    x = inputs_for(CIFAR, 3)
    single = torch.vmap(lambda image: module(image[None])[0])(x)
    torch.testing.assert_close(single, module(x), rtol=1e-3, atol=1e-4)


MISFITS = [
    ({"kind": "cnn"}, TEXT, "gpt"),
    ({"kind": "logistic"}, TEXT, "gpt"),
    ({"kind": "gpt"}, CIFAR, "logistic, mlp, cnn, resnet20"),
    ({"kind": "resnet20"}, VECTOR2, "logistic, mlp;"),
    ({"kind": "cnn", "channels": [2] * 4}, DIGITS, "fewer channels"),
    ({"kind": "resnet20"}, Spec("classification", (3, 7, 9), "float32", 2), "8x8"),
]


@pytest.mark.parametrize(("config", "spec", "remedy"), MISFITS)
def test_a_misfit_says_what_fits(config, spec, remedy):
    with pytest.raises(ConfigError, match=remedy):
        build(config, spec)


IMPOSSIBLE = [
    {"kind": "gpt", "d_model": 10, "n_head": 4},
    {"kind": "mlp", "widths": []},
    {"kind": "mlp", "widths": [0]},
    {"kind": "mlp", "dropout": 1.0},
    {"kind": "cnn", "chanels": [1]},
    {"kind": "resnet20", "norm": "none"},
    {"kind": "transformer"},
    {"kind": "no colon"},
    {"kind": "two:colons:here"},
    {},
]


@pytest.mark.parametrize("config", IMPOSSIBLE)
def test_impossible_tables_are_refused(config):
    with pytest.raises(ValidationError):
        MODELS.validate_python(config)


CUSTOM = """
from torch import nn
constant = 3
def make(spec, width=4):
    return nn.Sequential(nn.Linear(spec.input_shape[0], width), nn.Linear(width, spec.n_outputs))
def number(spec):
    return 3
"""


def test_a_users_own_model(tmp_path, monkeypatch):
    (tmp_path / "own_model_for_test.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    module = build({"kind": "own_model_for_test:make", "args": {"width": 9}}, VECTOR5)
    assert module[0].out_features == 9
    for kind, args, message in [
        ("own_model_for_test:make", {"depth": 1}, "depth"),
        ("own_model_for_test:number", {}, "torch.nn.Module"),
        ("own_model_for_test:missing", {}, "missing"),
        ("own_model_for_test:constant", {}, "not a function"),
        ("no_such_module_for_test:make", {}, "PYTHONPATH"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build({"kind": kind, "args": args}, VECTOR5)
