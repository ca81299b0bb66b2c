"""Copies of samples: does the batch where SGD saturates fall as B_S says?

    python -m benchmarks.replication --data DIR --out benchmarks/results/replication.json

After Yin et al. 2018 (arXiv 1706.05699), section 6: of n = 2000 samples only n / r are distinct,
each is there r times, so that n stays and gradient diversity falls.

(a) B_S at parameters that do not depend on the sample, measured through `measure_diversity` on the
    replicated set, against the closed form 1 + s2 / (mu2 + s2 r / n).
(b) Samples until the mean training loss is a fixed value, for SGD that sums gradients, i.e. with a
    step size in proportion to the batch, drawing with replacement. The step size is tuned at the
    base batch B0, for each r. Efficiency of a batch B: samples needed at B0 / samples needed at B.

What was expected, fixed before the runs. B80: the batch where efficiency falls through 0.8,
interpolated in log B. B_S: harmonic mean over the way of the tuned base run to the target, equally
spaced in samples.

    criterion  B80(r) / B80(1) is within 25 % of B_S(r) / B_S(1), for every r
    absolute   B80 = 1 + 0.2 B_S + 1.2 (B0 - 1): with the best step size at B0 a batch B brings
               2 - (1 + (B - 1) / B_S) / (1 + (B0 - 1) / B_S) of the progress per sample

Two problems: least squares with as many features as n / 2 and labels without noise, where s2 / mu2
is 1000 at the start; and an MLP on the first 2000 images of Fashion-MNIST. The MLP was first run
with 3 seeds and step sizes a factor of 2 apart (`fashion_mlp`), where seeds scatter B80 by a
factor of 2; `fashion_mlp_finer`, 8 seeds and a factor of sqrt 2, was added after that.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from benchmarks.machine import describe_machine
from hpctrain.census import measure_diversity
from hpctrain.data.arrays import ArraySamples
from hpctrain.data.idx import Idx
from hpctrain.data.spec import Spec
from hpctrain.models.flat import FlatModel
from hpctrain.models.loss import per_sample_loss
from hpctrain.models.mlp import Mlp
from hpctrain.stats import glm
from hpctrain.stats.diversity import replicated_b_s
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import run_threads

N = 2000
COPIES = (1, 2, 4, 8)
FEATURES = 999
RATIO = FEATURES + 1.0
"""s2 / mu2 of least squares at any w != w*: E|x|^2 (x.e)^2 = (d + 2) |e|^2, E x (x.e) = e."""
DRAWS = 20
ENOUGH = 0.8
LIMIT = 8.0
"""A run is given up after so many times the samples of the base run."""


class Problem(Protocol):
    """A replicated training set and a model; `w` is the problem's own."""

    def start(self) -> Any: ...
    def step(self, w: Any, rows: np.ndarray, lr: float) -> None:
        """w <- w - lr * sum over rows of the gradient."""

    def loss(self, w: Any) -> float: ...
    def b_s(self, w: Any) -> float: ...


class LeastSquares:
    """(x.w - y)^2 / 2, x ~ N(0, I), y = x.w*, from w = 0."""

    def __init__(self, copies: int, seed: int) -> None:
        rng = np.random.default_rng((copies, seed))
        self.distinct = N // copies
        self.x_ND = rng.standard_normal((self.distinct, FEATURES))
        truth_D = rng.standard_normal(FEATURES)
        self.y_N = self.x_ND @ (truth_D / np.linalg.norm(truth_D))

    def start(self) -> np.ndarray:
        return np.zeros(FEATURES)

    def step(self, w: np.ndarray, rows: np.ndarray, lr: float) -> None:
        x_BD = self.x_ND[rows % self.distinct]
        w -= lr * ((x_BD @ w - self.y_N[rows % self.distinct]) @ x_BD)

    def loss(self, w: np.ndarray) -> float:
        return float(np.square(self.x_ND @ w - self.y_N).mean() / 2)

    def b_s(self, w: np.ndarray) -> float:
        return glm.b_s(self.x_ND, self.x_ND @ w - self.y_N)


class FashionMlp:
    """The first images of Fashion-MNIST, one hidden layer of 64; the seed is the start's."""

    spec = Spec("classification", (784,), "float32", 10)

    def __init__(self, folder: Path, copies: int, seed: int) -> None:
        self.distinct, self.seed = N // copies, seed
        config = Idx(root=str(folder), folder="fashion-mnist", limit_train=N)
        (data,) = run_threads(1, lambda comm: config.load(comm, 0))
        images, labels = data.train.batch(np.arange(N), 0)
        self.x_ND, self.y_N = images[: self.distinct].flatten(1), labels[: self.distinct]

    def start(self) -> FlatModel:
        torch.manual_seed(self.seed)
        return FlatModel(Mlp(widths=[64]).build(self.spec))

    def step(self, w: FlatModel, rows: np.ndarray, lr: float) -> None:
        chosen = torch.from_numpy(rows % self.distinct)
        w.zero_grad()
        inputs, targets = self.x_ND[chosen], self.y_N[chosen]
        per_sample_loss(w.module, self.spec, inputs, targets)[0].sum().backward()
        w.params_P.sub_(w.grads_P, alpha=lr)

    @torch.no_grad()
    def loss(self, w: FlatModel) -> float:
        return float(per_sample_loss(w.module, self.spec, self.x_ND, self.y_N)[0].mean())

    def b_s(self, w: FlatModel) -> float:
        # Of the distinct samples: copies change neither mean nor covariance.
        samples = ArraySamples(self.x_ND.numpy(), self.y_N.numpy())

        def body(comm: Communicator) -> float:
            return measure_diversity(w, self.spec, samples, comm).b_s

        return run_threads(1, body)[0]


def walk(problem: Problem, lr: float, batch: int, seed: int) -> Iterator[tuple[int, Any]]:
    """SGD without end: samples taken so far, and the parameters, after every step."""
    rng = np.random.default_rng(seed)
    w, samples = problem.start(), 0
    while True:
        for rows in rng.integers(N, size=(max(1, 1024 // batch), batch)):
            yield samples, w
            problem.step(w, rows, lr)
            samples += batch


def samples_to(
    problem: Problem, lr: float, batch: int, seed: int, target: float, most: float
) -> float:
    """Samples until the training loss is `target`, interpolated in its logarithm; inf if never."""
    last, first, check = (0, 0.0), math.nan, 0.0
    for samples, w in walk(problem, lr, batch, seed):
        if samples < check:
            continue
        loss = problem.loss(w)
        first = loss if samples == 0 else first
        if not loss < 10 * first or samples > most:
            return math.inf
        if loss <= target:
            before, after = last[1], loss
            part = math.log(before / target) / math.log(before / after)
            return last[0] + part * (samples - last[0])
        last, check = (samples, loss), 1.03 * samples
    raise AssertionError


def b_s_on_the_way(
    problem: Problem, lr: float, batch: int, seed: int, until: float, points: int
) -> list[float]:
    """B_S at equally spaced numbers of samples, from the start to the target."""
    places = [until * k / (points - 1) for k in range(points)]
    found: list[float] = []
    for samples, w in walk(problem, lr, batch, seed):
        if samples >= places[len(found)]:
            found.append(problem.b_s(w))
            if len(found) == points:
                return found
    raise AssertionError


def crossing(batches: list[int], efficiency: list[float]) -> float:
    """The batch where efficiency falls through ENOUGH, interpolated in log B; inf if never."""
    pairs = list(zip(batches, efficiency, strict=True))
    for (low, above), (high, below) in zip(pairs, pairs[1:], strict=False):
        if below < ENOUGH:
            part = (above - ENOUGH) / (above - below)
            return float(low * (high / low) ** part)
    return math.inf


def saturation(
    make: Callable[[int, int], Problem],
    target: Callable[[Problem], float],
    lrs: list[float],
    batches: list[int],
    seeds: int,
    points: int,
    first_most: float,
) -> dict[str, Any]:
    """Part (b) of one problem: for each r the tuned step size, the curve, B80 and B_S."""
    base = batches[0]
    result: dict[str, Any] = {"base": base, "batches": batches, "lrs": lrs, "seeds": seeds}
    for copies in COPIES:
        problems = [make(copies, seed) for seed in range(seeds)]
        goals = [target(problem) for problem in problems]

        def run(lr: float, batch: int, most: list[float], of=(problems, goals)) -> list[float]:
            return [
                samples_to(problem, lr, batch, 100 + seed, goal, most[seed])
                for seed, (problem, goal) in enumerate(zip(*of, strict=True))
            ]

        tried = [run(lr, base, [first_most] * seeds) for lr in lrs]
        means = [statistics.mean(row) for row in tried]
        best = means.index(min(means))
        lr, needed = lrs[best], tried[best]
        most = [LIMIT * one for one in needed]
        curves = [needed] + [run(lr, batch, most) for batch in batches[1:]]
        rows = [[b / one for b, one in zip(needed, row, strict=True)] for row in curves]
        efficiency = [statistics.mean(row) for row in rows]
        ways = [
            b_s_on_the_way(problem, lr, base, 100 + seed, needed[seed], points)
            for seed, problem in enumerate(problems)
        ]
        b_s = statistics.harmonic_mean([one for way in ways for one in way])
        each = [crossing(batches, list(column)) for column in zip(*rows, strict=True)]
        result[str(copies)] = {
            "target": statistics.mean(goals),
            "lr": lr,
            "lr_at_an_end": best in (0, len(lrs) - 1),
            "base_samples": statistics.mean(needed),
            "efficiency": [round(one, 4) for one in efficiency],
            "b80": crossing(batches, efficiency),
            "b80_each": [round(one, 2) for one in each],
            "b_s": b_s,
            "b_s_on_the_way": [round(statistics.mean(at), 2) for at in zip(*ways, strict=True)],
            "b80_expected": 1 + 0.2 * b_s + 1.2 * (base - 1),
        }
        print(copies, result[str(copies)], file=sys.stderr, flush=True)
    one = result["1"]
    for copies in COPIES:
        found = result[str(copies)]
        ratio, expected = found["b80"] / one["b80"], found["b_s"] / one["b_s"]
        found |= {"b80_ratio": ratio, "b_s_ratio": expected}
        found["within_25_percent"] = abs(ratio / expected - 1) <= 0.25
    return result


def closed_form() -> dict[str, Any]:
    """Part (a): least squares at w = 0, which does not depend on the sample."""
    spec = Spec("regression", (FEATURES,), "float32", 1)
    result: dict[str, Any] = {"noise_to_signal": RATIO, "draws": DRAWS}
    for copies in COPIES:
        found = []
        for seed in range(DRAWS):
            problem = LeastSquares(copies, 1000 + seed)
            rows = np.arange(N) % problem.distinct
            samples = ArraySamples(problem.x_ND[rows].astype(np.float32), problem.y_N[rows, None])
            linear = nn.Linear(FEATURES, 1, bias=False)
            nn.init.zeros_(linear.weight)
            flat = FlatModel(linear.double())

            def body(comm: Communicator, flat=flat, samples=samples) -> float:
                return measure_diversity(flat, spec, samples, comm).b_s

            found += run_threads(1, body)
        expected = replicated_b_s(RATIO, N, copies)
        result[str(copies)] = {
            "measured": statistics.mean(found),
            "deviation": statistics.stdev(found),
            "expected": expected,
            "ratio": statistics.mean(found) / expected,
        }
        print(copies, result[str(copies)], file=sys.stderr, flush=True)
    return result


def spaced(base: int, low: int, high: int) -> list[int]:
    """The base batch, and batches a factor of sqrt 2 apart."""
    count = round(2 * math.log2(high / low))
    return [base] + [round(low * 2 ** (k / 2)) for k in range(count + 1)]


def least_squares() -> dict[str, Any]:
    return saturation(
        LeastSquares,
        lambda problem: 0.1 * problem.loss(problem.start()),
        [2 ** (k / 2) / FEATURES for k in range(-4, 4)],
        spaced(1, 8, 1024),
        seeds=8,
        points=21,
        first_most=60_000,
    )


def fashion_mlp(folder: Path, lrs: list[float], most: int, seeds: int) -> dict[str, Any]:
    return saturation(
        lambda copies, seed: FashionMlp(folder, copies, seed),
        lambda problem: 0.5,
        lrs,
        spaced(4, 8, most),
        seeds=seeds,
        points=7,
        first_most=30_000,
    )


def parts(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    coarse = [0.0025 * 2**k for k in range(6)]
    fine = [0.0025 * 2 ** (k / 2) for k in range(1, 7)]
    return {
        "closed_form": closed_form,
        "least_squares": least_squares,
        "fashion_mlp": lambda: fashion_mlp(folder, coarse, 512, 3),
        "fashion_mlp_finer": lambda: fashion_mlp(folder, fine, 128, 8),
    }


def table(record: dict[str, Any]) -> str:
    rows = ["| r | B_S measured | closed form | ratio |", "|---|---|---|---|"]
    for copies in COPIES:
        one = record["closed_form"][str(copies)]
        rows.append(
            f"| {copies} | {one['measured']:.0f} ± {one['deviation']:.0f} | "
            f"{one['expected']:.0f} | {one['ratio']:.3f} |"
        )
    for name in ("least_squares", "fashion_mlp", "fashion_mlp_finer"):
        rows += ["", f"{name}", ""]
        rows += [
            "| r | lr | samples | B_S | B80 | expected | B_S ratio | B80 ratio | within 25 % |"
        ]
        rows += ["|" + "---|" * 9]
        for copies in COPIES:
            one = record[name][str(copies)]
            rows.append(
                f"| {copies} | {one['lr']:.3g} | {one['base_samples']:.0f} | {one['b_s']:.0f} | "
                f"{one['b80']:.0f} | {one['b80_expected']:.0f} | {one['b_s_ratio']:.2f} | "
                f"{one['b80_ratio']:.2f} | {'yes' if one['within_25_percent'] else 'no'} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with fashion-mnist/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="parts to do again; the record keeps the others")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = {"n": N, "copies": COPIES, "enough": ENOUGH}
    if args.only:
        record = json.loads(args.out.read_text())
    for name, part in parts(args.data).items():
        if not args.only or name in args.only:
            record[name] = part()
    record["machine"] = describe_machine()
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
