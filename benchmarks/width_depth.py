"""Width against depth at an equal number of parameters: B_S, and the batch where SGD saturates.

    python -m benchmarks.width_depth [--log LOG] --out benchmarks/results/width_depth.json

After Chen et al. 2018 (arXiv 1806.03791): of networks with equally many parameters, wide ones
should bear larger batches than deep ones. Networks without biases of about 8,000 parameters and 1
to 10 hidden layers, linear or ReLU, learn 1,024 of the digits (8 x 8 pixels, 10 classes), by SGD
on batches drawn with replacement.

    steps(B)    until the loss of the whole set is TARGET, at the best step size of a grid in
                factors of 2, for this B and seed
    critical B  the B of the least-squares fit (of logarithms) steps(B) = c (1/B + 1/critical)
    B50         where B * steps(B), the samples, are twice those at the smallest batch
    B_S         exact, at equal numbers of samples on the way of the best run at BASE; harmonic mean

If B_S is the bound that it is taken for, critical B is B_S - 1, whatever the shape.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.machine import describe_machine
from hpctrain.stats.diversity import of_matrix

N, FEATURES, CLASSES = 1024, 64, 10
PARAMETERS = 8000
DEPTHS = [1, 2, 3, 5, 10]
TARGET = 0.1
SEEDS = [0, 1, 2, 3, 4]
BATCHES = [2**k for k in range(11)]
BASE = BATCHES[0]
LRS = [2.0**k for k in range(-9, 2)]
CHECKS = 1.02
"""The loss is looked at whenever the steps have grown by this factor."""
MOST_SAMPLES = 3_000_000
POINTS = 9
"""Where B_S is measured, from the start to the target."""

Layers = list[Tensor]
"""(R, inputs, outputs) each: R networks at once."""


@dataclass(frozen=True)
class Shape:
    """Equally many parameters, as nearly as whole widths allow."""

    depth: int
    """Hidden layers."""
    activation: str
    """"linear" or "relu"."""

    @property
    def width(self) -> int:
        ends, between = FEATURES + CLASSES, self.depth - 1
        if not between:
            return round(PARAMETERS / ends)
        return round((math.sqrt(ends**2 + 4 * between * PARAMETERS) - ends) / (2 * between))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        widths = [FEATURES, *[self.width] * self.depth, CLASSES]
        return list(zip(widths, widths[1:], strict=False))

    @property
    def parameters(self) -> int:
        return sum(a * b for a, b in self.sizes)

    def start(self, seed: int) -> Layers:
        """One network: normal weights that keep the size of what passes (He et al. for ReLU)."""
        random = torch.Generator().manual_seed(seed)
        gain = 2.0 if self.activation == "relu" else 1.0
        return [
            torch.randn(a, b, generator=random) * math.sqrt((gain if place else 1.0) / a)
            for place, (a, b) in enumerate(self.sizes)
        ]

    def outputs(self, layers: Layers, inputs: Tensor) -> Tensor:
        values = inputs @ layers[0]
        for layer in layers[1:]:
            values = (values.relu() if self.activation == "relu" else values) @ layer
        return values


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.data))[:N]
    pixels = torch.from_numpy((found.data[order] / 16.0).astype(np.float32))
    return (pixels - pixels.mean()) / pixels.std(), torch.from_numpy(found.target[order])


class Race:
    """A network per step size and seed, all at the same step, on the same batches by seed."""

    def __init__(self, shape: Shape, batch: int, data: tuple[Tensor, Tensor]) -> None:
        self.shape, self.batch, self.data = shape, batch, data
        rows = [(seed, lr) for seed in range(len(SEEDS)) for lr in LRS]
        starts = [shape.start(SEEDS[seed]) for seed, _ in rows]
        self.layers = [torch.stack(layer).requires_grad_() for layer in zip(*starts, strict=True)]
        self.seed_of = torch.tensor([seed for seed, _ in rows])
        self.lr_R = torch.tensor([lr for _, lr in rows])[:, None, None]
        self.random = [np.random.default_rng((7, seed, batch)) for seed in SEEDS]

    def step(self) -> None:
        drawn = np.stack([random.integers(N, size=self.batch) for random in self.random])
        chosen = torch.from_numpy(drawn)[self.seed_of]
        inputs, targets = self.data[0][chosen], self.data[1][chosen]
        outputs = self.shape.outputs(self.layers, inputs)
        loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")
        slopes = torch.autograd.grad(loss / self.batch, self.layers)
        with torch.no_grad():
            for layer, slope in zip(self.layers, slopes, strict=True):
                layer -= self.lr_R * slope

    @torch.no_grad()
    def losses(self) -> list[list[float]]:
        """By seed and step size; inf where it diverged."""
        outputs = self.shape.outputs(self.layers, self.data[0].expand(len(self.lr_R), -1, -1))
        targets = self.data[1].expand(len(self.lr_R), -1)
        each = F.cross_entropy(outputs.mT, targets, reduction="none").mean(1)
        each = torch.where(torch.isfinite(each), each, math.inf)
        found: list[list[float]] = each.view(len(SEEDS), len(LRS)).tolist()
        return found


def steps_to_target(race: Race) -> list[tuple[float, float]]:
    """By seed: steps of the first network to arrive, and its step size; inf if none does."""
    found: list[tuple[float, float]] = [(math.inf, math.nan)] * len(SEEDS)
    before, last, check = race.losses(), 0, 1.0
    for step in range(1, MOST_SAMPLES // race.batch + 1):
        race.step()
        if step < check:
            continue
        now = race.losses()
        for seed, (old_row, row) in enumerate(zip(before, now, strict=True)):
            for old, loss, lr in zip(old_row, row, LRS, strict=True):
                if loss <= TARGET < old:
                    part = math.log(old / TARGET) / math.log(old / loss)
                    arrival = last + part * (step - last)
                    found[seed] = min(found[seed], (arrival, lr))
        before, last, check = now, step, max(step + 1, CHECKS * step)
        if all(math.isfinite(arrival) for arrival, _ in found):
            break
    return found


def per_sample(shape: Shape, layers: Layers, data: tuple[Tensor, Tensor]) -> Tensor:
    """(n, P)."""

    def loss(layers: Layers, inputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(shape.outputs(layers, inputs), target)

    parts = vmap(grad(loss), in_dims=(None, 0, 0))(layers, *data)
    return torch.cat([part.flatten(1) for part in parts], 1)


def on_the_way(
    shape: Shape, data: tuple[Tensor, Tensor], seed: int, lr: float, steps: float
) -> list[float]:
    """B_S at POINTS equally spaced steps of the run at BASE that arrived first."""
    race = Race(shape, BASE, data)
    place = seed * len(LRS) + LRS.index(lr)
    found = []
    done = 0
    for point in range(POINTS):
        while done < round(point * steps / (POINTS - 1)):
            race.step()
            done += 1
        layers = [layer[place].detach() for layer in race.layers]
        found.append(of_matrix(per_sample(shape, layers, data)).b_s)
    return found


def critical(steps: list[float]) -> float:
    """The B of steps(B) = c (1/B + 1/critical), least squares of logarithms; inf: no knee."""
    batches = np.array(BATCHES, float)
    candidates = np.geomspace(1.0, 1e5, 2001)
    log_steps = np.log(np.array(steps))
    errors = [float(np.var(log_steps - np.log(1 / batches + 1 / one))) for one in candidates]
    best = int(np.argmin(errors))
    return math.inf if best == len(candidates) - 1 else float(candidates[best])


def doubled(steps: list[float]) -> float:
    """The batch at which samples are twice those at BASE, interpolated in logarithms."""
    samples = [batch * one / (BASE * steps[0]) for batch, one in zip(BATCHES, steps, strict=True)]
    for place in range(1, len(samples)):
        low, high = samples[place - 1], samples[place]
        if high >= 2.0:
            part = math.log(2.0 / low) / math.log(high / low)
            return float(BATCHES[place - 1] * 2.0**part)
    return math.inf


def study(shape: Shape, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    by_batch = [steps_to_target(Race(shape, batch, data)) for batch in BATCHES]
    steps_SB = [[found[seed][0] for found in by_batch] for seed in range(len(SEEDS))]
    lrs_SB = [[found[seed][1] for found in by_batch] for seed in range(len(SEEDS))]
    ways = [
        on_the_way(shape, data, seed, lrs_SB[seed][0], steps_SB[seed][0])
        for seed in range(len(SEEDS))
    ]
    return {
        "depth": shape.depth,
        "activation": shape.activation,
        "width": shape.width,
        "parameters": shape.parameters,
        "steps": [[round(one, 2) for one in row] for row in steps_SB],
        "lrs": lrs_SB,
        "lr_at_an_end": any(lr in (LRS[0], LRS[-1]) for row in lrs_SB for lr in row),
        "b_s_on_the_way": [[round(one, 2) for one in way] for way in ways],
        "b_s": [round(statistics.harmonic_mean(way), 2) for way in ways],
        "b50": [round(doubled(row), 2) for row in steps_SB],
        "critical": [round(critical(row), 2) for row in steps_SB],
    }


def logged(log: Path | None, make: Callable[[Shape], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every shape's study, those in the log without repeating them."""
    lines = log.read_text().splitlines() if log and log.exists() else []
    done = {(row["activation"], row["depth"]): row for row in map(json.loads, lines)}
    for activation in ("linear", "relu"):
        for depth in DEPTHS:
            row = done.get((activation, depth))
            if row is None:
                row = make(Shape(depth, activation))
                print(row, file=sys.stderr, flush=True)
                if log:
                    with open(log, "a") as file:
                        file.write(json.dumps(row) + "\n")
            yield row


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | hidden layers | width | parameters | B_S on the way | critical B | B50 |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            ", ".join(f"{one:.0f}" for one in row[name]) for name in ("b_s", "critical", "b50")
        ]
        start = f"| {row['activation']} | {row['depth']} | {row['width']} | {row['parameters']:,} |"
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log", type=Path, help="finished shapes, not repeated")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    rows = list(logged(args.log, lambda shape: study(shape, data)))
    record = {
        "machine": describe_machine(),
        "setting": {
            "samples": N, "target": TARGET, "seeds": SEEDS, "batches": BATCHES, "lrs": LRS,
            "points": POINTS,
        },
        "shapes": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
