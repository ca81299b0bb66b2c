"""Diversity-inducing mechanisms: is the measured diversity the predicted one?

    python -m benchmarks.mechanisms --data DIR --out benchmarks/results/mechanisms.json

After Yin et al. 2018 (arXiv 1706.05699). A mechanism adds to each sample's gradient g_i something
random of mean 0, independent between samples, of mean squared length V_i. Then

    B_S  = n sum |g_i|^2 / |sum g_i|^2     becomes
    B_S' = n (sum |g_i|^2 + sum V_i) / (|sum g_i|^2 + sum V_i)

Measured at fixed parameters, at the start and later in a training, by drawing what is added to the
exact gradients of n samples and taking B_S of the result; V_i comes from other draws.

    langevin   [[regulariser]] kind = "noise", per = "sample", on one sample at a time
    quantise   levels of [exchange] kind = "quantise", scheme = "qsgd", of every sample's gradient
    dropout    [model] dropout; g_i is then the mean over masks, of another loss than without
    one mask   dropout with one mask for all samples: a control, for which the formula must fail
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.machine import describe_machine
from hpctrain.compress.quantiser import Quantiser
from hpctrain.data.idx import Idx
from hpctrain.data.spec import Spec
from hpctrain.models.flat import FlatModel
from hpctrain.models.mlp import Mlp
from hpctrain.regularise.noise import Noise
from hpctrain.stats.diversity import of_matrix
from hpctrain.transport.threads import run_threads

N = 256
STAGES = [0, 100, 1000]
"""SGD steps before measuring."""
DRAWS, OTHER_DRAWS = 10, 40
"""Of the diversity, and of V."""
VARIANCES = [0.1, 1.0, 10.0]
"""Of the noise, in units of the mean |g_i|^2."""
BITS, CHUNK = [8, 4, 2], 512
DROPOUTS = [0.1, 0.3, 0.5]

Draw = Callable[[], Tensor]
"""(n, P): the gradients of all samples with what a mechanism adds to them."""
Row = dict[str, Any]


def model(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    spec = Spec("classification", (784,), "float32", 10)
    return Mlp(widths=[64, 64], dropout=dropout).build(spec)


def trained(images: Tensor, labels: Tensor, steps: int) -> FlatModel:
    """After so many steps of SGD on batches of 32, lr 0.05."""
    flat = FlatModel(model(0.0))
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,), generator=random)
        flat.zero_grad()
        F.cross_entropy(flat.module(images[chosen]), labels[chosen]).backward()
        flat.params_P.sub_(flat.grads_P, alpha=0.05)
    return flat


def gradients(flat: FlatModel, images: Tensor, labels: Tensor, dropout: float, masks: str) -> Draw:
    """Of all samples at the parameters of `flat`, (n, P); `masks` are "different" or the "same"."""
    module = model(dropout)
    parameters = dict(zip(flat.names, flat.views(flat.params_P), strict=True))

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        outputs = functional_call(module, parameters, (image[None],))
        return F.cross_entropy(outputs, label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0), randomness=masks)

    def draw() -> Tensor:
        parts = each(parameters, images, labels)
        return torch.cat([parts[name].flatten(1) for name in flat.names], 1)

    return draw


def langevin(flat: FlatModel, g_NP: Tensor, variance: float) -> Draw:
    """hpctrain's own noise, a step of it for every sample."""
    noise = Noise(variance=variance).build(flat, 0)
    step = iter(range(10**9))

    def draw() -> Tensor:
        noisy = []
        for g_P in g_NP:
            flat.grads_P.copy_(g_P)
            noise.adjust_gradient(next(step), 1)
            noisy.append(flat.grads_P.clone())
        return torch.stack(noisy)

    return draw


def quantised(g_NP: Tensor, bits: int) -> Draw:
    """What others read of every sample's gradient, unbiased levels."""
    quantiser = Quantiser(g_NP.shape[1], "qsgd", bits, CHUNK, unbiased=True)
    random = np.random.default_rng(0)
    padded = np.zeros((len(g_NP), quantiser.padded), np.float32)
    padded[:, : quantiser.n] = g_NP.numpy()
    message = np.zeros(quantiser.message_bytes, np.uint8)

    def draw() -> Tensor:
        read = np.empty_like(padded)
        for given, taken in zip(padded, read, strict=True):
            quantiser.write(given, message, random)
            for block in quantiser.blocks():
                quantiser.read(message, block, taken[quantiser.entries(block)])
        return torch.from_numpy(read[:, : quantiser.n])

    return draw


def independent(draw: Draw, draws: int) -> tuple[float, float, float]:
    """sum V_i, sum |g_i|^2 and |sum g_i|^2 of the means g_i, unbiased, from so many draws."""
    first = draw().double()
    total, squares = first.clone(), first.square().sum(1)
    for _ in range(draws - 1):
        one = draw().double()
        total += one
        squares += one.square().sum(1)
    mean = total / draws
    variance_N = (squares - draws * mean.square().sum(1)) / (draws - 1)
    # A mean of K draws is too long by V / K.
    sum_v = float(variance_N.sum())
    spare = sum_v / draws
    return sum_v, float(mean.square().sum()) - spare, float(mean.sum(0).square().sum()) - spare


def compare(draw: Draw) -> Row:
    """Prediction from some draws, measurement on others."""
    sum_v, sum_sq, norm_sq = independent(draw, OTHER_DRAWS)
    found = [of_matrix(draw()).b_s for _ in range(DRAWS)]
    predicted = N * (sum_sq + sum_v) / (norm_sq + sum_v)
    measured = statistics.fmean(found)
    return {
        "v_over_sq": sum_v / sum_sq,
        "b_s_of_means": N * sum_sq / norm_sq,
        "predicted": predicted,
        "measured": measured,
        "deviation": statistics.stdev(found),
        "ratio": measured / predicted,
    }


def cases(
    flat: FlatModel, images: Tensor, labels: Tensor, exact: Tensor
) -> Iterator[tuple[str, float, Draw]]:
    size = float(exact.square().sum(1).mean())
    for variance in VARIANCES:
        yield "langevin", variance, langevin(flat, exact, variance * size)
    for bits in BITS:
        yield "quantise", bits, quantised(exact, bits)
    for dropout in DROPOUTS:
        yield "dropout", dropout, gradients(flat, images, labels, dropout, "different")
    yield "one mask", 0.3, gradients(flat, images, labels, 0.3, "same")


def study(images: Tensor, labels: Tensor, steps: int) -> Row:
    flat = trained(images, labels, steps)
    chosen = slice(0, N)
    exact = gradients(flat, images[chosen], labels[chosen], 0.0, "error")()
    rows = []
    for mechanism, value, draw in cases(flat, images[chosen], labels[chosen], exact):
        rows.append({"mechanism": mechanism, "value": value} | compare(draw))
        print(steps, rows[-1], file=sys.stderr, flush=True)
    return {"steps": steps, "b_s": of_matrix(exact).b_s, "rows": rows}


def table(record: Row) -> str:
    lines = ["| steps | mechanism | V / mean of g² | B_S without | of the means | predicted | "
             "measured | ratio |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for stage in record["stages"]:
        for row in stage["rows"]:
            lines.append(
                f"| {stage['steps']} | {row['mechanism']} {row['value']:g} | "
                f"{row['v_over_sq']:.3g} | {stage['b_s']:.1f} | {row['b_s_of_means']:.1f} | "
                f"{row['predicted']:.1f} | {row['measured']:.1f} ± {row['deviation']:.1f} | "
                f"{row['ratio']:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with fashion-mnist/")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = Idx(root=str(args.data), folder="fashion-mnist", limit_train=4096)
    (data,) = run_threads(1, lambda comm: config.load(comm, 0))
    images, labels = data.train.batch(np.arange(4096), 0)
    record = {
        "machine": describe_machine(),
        "setting": {"samples": N, "draws": DRAWS, "other_draws": OTHER_DRAWS, "chunk": CHUNK},
        "stages": [study(images.flatten(1), labels, steps) for steps in STAGES],
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
