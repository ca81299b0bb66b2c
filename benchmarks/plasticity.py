"""Loss of plasticity under successive label permutations, with and without regularisers.

    python -m benchmarks.plasticity --data DIR --log LOG --out benchmarks/results/plasticity.json
    python -m benchmarks.plasticity --data DIR --log LOG --permute names --optimisers sgd \
        --methods none l2 spectral --out benchmarks/results/plasticity_names.json

One network learns the same MNIST images eleven times in a row; before every time but the first the
labels are permuted anew. Nothing is reset between these tasks. Two ways to permute:

    labels   over the images, 500 of them, 40 epochs a task: what was learned is of no use
    names    of the ten digits, 4,000 images, 10 epochs: only the last layer need learn anew

Measured per task, in % of the training images: accuracy of each batch before it is learned from,
averaged over the task ("during"), and accuracy on all images at its end ("end"). At the first batch
of a task, of 128 images: grad_erank and B_S; and the largest singular value of all matrices.

Step size and strength of every method are chosen on one seed (TUNING_SEED), from grids of equally
many values, by "during" averaged over the last three tasks; then other seeds are measured, those
few strengths and step sizes alone. Finished trainings stand in the log and are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from hpctrain.data.idx import Idx
from hpctrain.data.spec import Spec
from hpctrain.models.flat import FlatModel
from hpctrain.models.mlp import Mlp
from hpctrain.optimiser import AdamW, Optimiser, Sgd
from hpctrain.randomness import RandomState
from hpctrain.regularise.regularisers import Regularisers
from hpctrain.regularise.spectral import Spectral
from hpctrain.regularise.wasserstein import Wasserstein
from hpctrain.stats.diversity import effective_rank, from_sums
from hpctrain.stats.per_sample import PerSample
from hpctrain.transport.threads import run_threads

WIDTHS = [64, 64]
BATCH, TASKS = 32, 11
LAST = 3
PROBE = 128
TUNING_SEED = 100
SEEDS = [0, 1, 2, 3, 4]
LRS = {"sgd": [0.003, 0.01, 0.03], "adamw": [0.0003, 0.001, 0.003]}
STRENGTHS = {
    "none": [0.0],
    "l2": [1e-4, 1e-3, 1e-2],
    "spectral": [1e-3, 1e-2, 1e-1],
    "wasserstein": [1e1, 1e2, 1e3],
}
DECAY = {"sgd": 1.0, "adamw": 100.0}
"""weight_decay is this times the strength of `l2`: AdamW's acts apart from its moments."""
Run = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """How labels are permuted."""

    images: int
    epochs: int
    """Of a task."""
    permute: Callable[[Tensor, torch.Generator], Tensor]
    """(N,) labels -> those of another task."""


def over_images(labels: Tensor, random: torch.Generator) -> Tensor:
    return labels[torch.randperm(len(labels), generator=random)]


def of_digits(labels: Tensor, random: torch.Generator) -> Tensor:
    return torch.randperm(10, generator=random)[labels]


KINDS = {"labels": Kind(500, 40, over_images), "names": Kind(4000, 10, of_digits)}


@dataclass(frozen=True)
class Choice:
    """A training but for its seed."""

    kind: str
    optimiser: str
    method: str
    lr: float
    strength: float


class Penalised:
    """Optimiser and regularisers of a choice, on one model."""

    def __init__(self, choice: Choice, flat: FlatModel) -> None:
        decay = choice.strength * DECAY[choice.optimiser] if choice.method == "l2" else 0.0
        self.optimiser: Optimiser
        if choice.optimiser == "sgd":
            self.optimiser = Sgd(momentum=0.9, weight_decay=decay).build(flat)
        else:
            self.optimiser = AdamW(weight_decay=decay).build(flat)
        tables: dict[str, type[Spectral] | type[Wasserstein]]
        tables = {"spectral": Spectral, "wasserstein": Wasserstein}
        table = tables.get(choice.method)
        running = [table(strength=choice.strength).build(flat, 0)] if table else []
        self.regularisers = Regularisers([(choice.method, regulariser) for regulariser in running])
        self.lr = choice.lr

    def step(self, step: int, samples: int) -> None:
        self.regularisers.adjust_gradient(step, samples)
        self.optimiser.step(self.lr)


def sample_loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(module(inputs), targets, reduction="none")


def probe(flat: FlatModel, inputs: Tensor, targets: Tensor) -> Run:
    """Diversity of single samples' gradients, and the largest singular value."""
    taker = PerSample(flat.module, sample_loss)
    gradients = taker.gradients(inputs, targets)
    squares, total = gradients.squares().sum(0), gradients.total()
    n = len(targets)
    matrices = [view for view in flat.views(flat.params_P) if view.ndim > 1]
    return {
        "grad_erank": effective_rank(gradients.products(gradients)),
        "b_s": from_sums(n, n, taker.names, taker.sizes, squares, total).b_s,
        "sigma_max": max(float(torch.linalg.svdvals(w)[0]) for w in matrices),
    }


def learn(choice: Choice, seed: int, images: Tensor, labels: Tensor) -> Run:
    """All tasks of one training on (N, features) images: a list per measure."""
    RandomState(seed, 0).seed_model()
    flat = FlatModel(Mlp(widths=WIDTHS).build(Spec("classification", (784,), "float32", 10)))
    penalised = Penalised(choice, flat)
    random = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {}
    kind, step = KINDS[choice.kind], 0
    for task in range(TASKS):
        targets = kind.permute(labels, random) if task else labels
        if not flat.params_P.isfinite().all():  # diverged in a task before
            for values in found.values():
                values.append(0.0)
            continue
        told = probe(flat, images[:PROBE], targets[:PROBE])
        correct = torch.zeros((), dtype=torch.int64)
        for _ in range(kind.epochs):
            for chosen in torch.randperm(len(images), generator=random).split(BATCH):
                flat.zero_grad()
                outputs = flat.module(images[chosen])
                F.cross_entropy(outputs, targets[chosen]).backward()
                correct += (outputs.detach().argmax(1) == targets[chosen]).sum()
                penalised.step(step, len(chosen))
                step += 1
        with torch.no_grad():
            right = flat.module(images).argmax(1) == targets
        told["during"] = 100.0 * float(correct) / (kind.epochs * len(images))
        told["end"] = 100.0 * float(right.double().mean())
        for name, value in told.items():
            found.setdefault(name, []).append(round(float(value), 4))
    return found


def last(run: Run, measure: str = "during") -> float:
    return statistics.fmean(run[measure][-LAST:])


class Trainings:
    """Finished trainings by choice and seed, kept in a log."""

    def __init__(self, log: Path, images: Tensor, labels: Tensor) -> None:
        self._log, self._data = log, (images, labels)
        lines = log.read_text().splitlines() if log.exists() else []
        self._done = {self._key(entry): entry["run"] for entry in map(json.loads, lines)}

    def of(self, choice: Choice, seed: int) -> Run:
        entry: Run = {"choice": asdict(choice), "seed": seed}
        if self._key(entry) not in self._done:
            entry["run"] = learn(choice, seed, *self._data)
            with open(self._log, "a") as file:
                file.write(json.dumps(entry) + "\n")
            self._done[self._key(entry)] = entry["run"]
            print(choice, seed, f"{last(entry['run']):.2f}", file=sys.stderr, flush=True)
        run: Run = self._done[self._key(entry)]
        return run

    @staticmethod
    def _key(entry: Run) -> str:
        return json.dumps([entry["choice"], entry["seed"]])


def measure(trainings: Trainings, kind: str, optimiser: str, methods: list[str]) -> Run:
    """The grid on one seed, then every method's choice of it on others."""
    grid, results = [], {}
    for method in methods:
        choices = [
            Choice(kind, optimiser, method, lr, strength)
            for lr, strength in itertools.product(LRS[optimiser], STRENGTHS[method])
        ]
        scores = [last(trainings.of(choice, TUNING_SEED)) for choice in choices]
        grid += [asdict(c) | {"during": s} for c, s in zip(choices, scores, strict=True)]
        best = choices[int(np.argmax(scores))]
        runs = [trainings.of(best, seed) for seed in SEEDS]
        results[method] = {"lr": best.lr, "strength": best.strength, "runs": runs}
    # What the others have at the step size that is best for `none`.
    lr = results["none"]["lr"]
    at_lr = {}
    for method in methods:
        cells = [cell for cell in grid if cell["method"] == method and cell["lr"] == lr]
        best_cell = max(cells, key=lambda cell: float(cell["during"]))
        at_lr[method] = best_cell["during"]
    return {"grid": grid, "methods": results, "tuned_at_the_lr_of_none": at_lr} | gains(results)


def gains(results: Run) -> Run:
    """Points more than `none`, seed by seed: mean and half a 95 % interval (Student)."""
    student = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
    found: Run = {}
    for method in results:
        if method == "none":
            continue
        for name in ("during", "end"):
            for span in (1, LAST):
                each = [
                    statistics.fmean(ours[name][-span:]) - statistics.fmean(plain[name][-span:])
                    for ours, plain in zip(
                        results[method]["runs"], results["none"]["runs"], strict=True
                    )
                ]
                half = student[len(each)] * statistics.stdev(each) / len(each) ** 0.5
                key = f"{name}, last {span} task{'s' if span > 1 else ''}"
                found.setdefault(method, {})[key] = {
                    "mean": round(statistics.fmean(each), 3),
                    "half_95": round(half, 3),
                    "each": [round(value, 3) for value in each],
                }
    return {"more_than_none": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist/")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--permute", choices=list(KINDS), default="labels")
    parser.add_argument("--optimisers", nargs="+", default=list(LRS), choices=list(LRS))
    parser.add_argument("--methods", nargs="+", default=list(STRENGTHS), choices=list(STRENGTHS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind = KINDS[args.permute]
    config = Idx(root=str(args.data), folder="mnist", limit_train=kind.images)
    (data,) = run_threads(1, lambda comm: config.load(comm, 0))
    images, labels = data.train.batch(np.arange(kind.images), 0)
    trainings = Trainings(args.log, images.flatten(1), labels)
    record = {
        "machine": describe_machine(),
        "setting": {
            "widths": WIDTHS, "images": kind.images, "batch": BATCH, "epochs": kind.epochs,
            "tasks": TASKS, "last": LAST, "probe": PROBE, "tuning_seed": TUNING_SEED,
            "seeds": SEEDS, "lrs": LRS, "strengths": STRENGTHS, "decay": DECAY,
        },
        "permute": args.permute,
        "optimisers": {
            name: measure(trainings, args.permute, name, args.methods) for name in args.optimisers
        },
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, found in record["optimisers"].items():
        print(name, json.dumps(found["more_than_none"], indent=1))


if __name__ == "__main__":
    main()
