"""The measured B_S against the whole training set's, along trainings; and coverage in simulations.

    python -m benchmarks.noise_scale run --log FILE [--problems NAME ...] [--trials 40]
    python -m benchmarks.noise_scale summary --log FILE [--out FILE]

`run` appends a JSON line per training and goes on where the log ends. Plain SGD, 4 groups of equal
size per step, epochs without replacement, one process. At four checkpoints per training:

truth       1 + sum s2 / sum mu2 over the whole training set, at 4 iterates of the last 16 steps
            (the shortest window of the estimate): near the end of stability |E g|² changes by a
            factor of several from one step to the next. `at_point` is that of the last iterate.
groups      hpctrain's estimate (hpctrain/stats/average.py)
divebatch   n Delta of the last whole epoch as DiveBatch estimates it (arXiv 2509.16173):
            n sum_i |g_i|² / |sum_i g_i|², every gradient where training stood when it was taken
averages    1 + ratio of exponential averages of s2 and mu2, factor 0.99, bias-corrected
corrected   the estimate with the correction for a fixed set of n, n B_S / (n - 1 + B_S)

Trials differ in sample order, and the networks in initial parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine
from benchmarks.noise_coverage import simulate
from benchmarks.noise_problems import (
    Problem,
    a9a,
    fashion_cnn,
    mnist_mlp,
    noisy_logistic,
    truth,
)
from hpctrain.stats.average import NoiseAverage
from hpctrain.stats.noise import GroupSums

GROUPS = 4
NEAR = (12, 8, 4, 0)
"""Steps before the checkpoint whose parameters the truth is averaged over."""
EMA = 0.99


@dataclass(frozen=True)
class Training:
    n: int
    batch: int
    lr: float
    checkpoints: tuple[int, int, int, int]
    """Steps; the later ones are ends of epochs."""
    load: Callable[[Path], Problem]


TRAININGS = {
    "a9a": Training(32_561, 128, 0.1, (30, 254, 762, 2032), a9a),
    "a9a_512": Training(32_561, 512, 0.4, (20, 63, 189, 504), a9a),
    "noisy_logistic": Training(20_000, 128, 2.0, (30, 156, 468, 1560), noisy_logistic),
    "mnist_mlp": Training(5_000, 128, 0.05, (20, 78, 195, 585), mnist_mlp),
    "fashion_cnn": Training(5_000, 64, 0.01, (20, 78, 156, 390), fashion_cnn),
}


def train(training: Training, problem: Problem, seed: int) -> dict[str, Any]:
    """One training: both sums of every step, and the whole set's moments near checkpoints."""
    batch, order = training.batch, torch.Generator().manual_seed(seed)
    params_P = problem.start(seed)
    per_epoch = problem.n // batch
    near = {at - before for at in training.checkpoints for before in NEAR}
    sums: list[tuple[float, float]] = []
    moments: dict[int, tuple[float, float]] = {}
    divebatch: dict[int, float] = {}
    for step in range(1, training.checkpoints[-1] + 1):
        place = (step - 1) % per_epoch
        if place == 0:
            epoch = torch.randperm(problem.n, generator=order)
            squares, total_P = 0.0, torch.zeros_like(params_P)
        index_KB = epoch[place * batch : (place + 1) * batch].view(GROUPS, -1)
        gradients_KP, norms_KB = problem.pass_over(params_P, index_KB)
        mean_P = gradients_KP.mean(0)
        squares += float(norms_KB.sum())
        total_P += batch * mean_P
        if place == per_epoch - 1:
            divebatch[step] = problem.n * squares / float(total_P @ total_P)
        weighted = batch / GROUPS * float((gradients_KP * gradients_KP).sum())
        sums.append((weighted, float(mean_P @ mean_P)))
        params_P = params_P - training.lr * mean_P
        if step in near:
            moments[step] = truth(problem, params_P)
    return {"sums": sums, "moments": moments, "divebatch": divebatch}


def evaluate(training: Training, trial: dict[str, Any]) -> list[dict[str, Any]]:
    """What the estimates say at each checkpoint, and the truth."""
    average, ema, found = NoiseAverage(), np.zeros(2), []
    for step, (weighted, mean_sq) in enumerate(trial["sums"], start=1):
        sums = GroupSums(GROUPS, training.batch, weighted, mean_sq)
        average.add(sums)
        ema = EMA * ema + (1.0 - EMA) * np.array(sums.moments())
        if step not in training.checkpoints:
            continue
        moments = [trial["moments"][str(step - before)] for before in NEAR]
        s2, mu2 = np.sum(moments, 0).tolist()
        epochs = [int(end) for end in trial["divebatch"] if int(end) <= step]
        estimate = average.estimate()
        assert estimate is not None
        found.append(
            {
                "step": step,
                "truth": 1.0 + s2 / mu2,
                "at_point": 1.0 + moments[-1][0] / moments[-1][1],
                "estimate": asdict(estimate),
                "averages": float(1.0 + ema[0] / ema[1]),
                "divebatch": trial["divebatch"][str(max(epochs))] if epochs else None,
            }
        )
    return found


def run(log: Path, root: Path, names: list[str], trials: int) -> None:
    done = {(one["problem"], one["seed"]) for one in read(log)}
    for name in names:
        wanted = [seed for seed in range(trials) if (name, seed) not in done]
        if not wanted:
            continue
        problem = TRAININGS[name].load(root)
        for seed in wanted:
            line = {"problem": name, "seed": seed} | train(TRAININGS[name], problem, seed)
            with open(log, "a") as out:
                out.write(json.dumps(line) + "\n")


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def summarise(log: Path) -> dict[str, Any]:
    problems = {}
    for name, training in TRAININGS.items():
        trials = [evaluate(training, one) for one in read(log) if one["problem"] == name]
        if not trials:
            continue
        by_checkpoint = [checkpoint(rows, training.n) for rows in zip(*trials, strict=True)]
        good = [sum(is_near(row) for row in trial) for trial in trials]
        wrong = [sum(not covers(row, "truth") for row in trial) for trial in trials]
        problems[name] = {
            "n": training.n,
            "batch": training.batch,
            "groups": GROUPS,
            "lr": training.lr,
            "trials": len(trials),
            "checkpoints": by_checkpoint,
            "resolved_within_2x_of_4": statistics.fmean(good),
            "checkpoints_most_trials_resolve_within_2x": sum(
                point["resolved_within_2x"] > 0.5 for point in by_checkpoint
            ),
            "covered": 1.0 - sum(wrong) / (4 * len(trials)),
            "covered_at_point": statistics.fmean(
                covers(row, "at_point") for trial in trials for row in trial
            ),
        }
    return problems


def covers(row: dict[str, Any], key: str) -> bool:
    estimate = row["estimate"]
    covered: bool = estimate["low"] <= row[key] <= estimate["high"]
    return covered


def is_near(row: dict[str, Any]) -> bool:
    estimate = row["estimate"]
    return estimate["resolved"] and within_2x(estimate["b_s"], row["truth"])


def corrected(row: dict[str, Any], n: int) -> float:
    b_s: float = row["estimate"]["b_s"]
    return n * b_s / (n - 1 + b_s)


def within_2x(b_s: float, known: float) -> bool:
    return 0.5 <= b_s / known <= 2.0


def checkpoint(rows: tuple[dict[str, Any], ...], n: int) -> dict[str, Any]:
    """One checkpoint over all trials, of a set of n samples."""
    resolved = [row for row in rows if row["estimate"]["resolved"]]
    bounds = [row for row in rows if not row["estimate"]["resolved"]]
    count = len(rows)
    result: dict[str, Any] = {
        "step": rows[0]["step"],
        "truth": spread([row["truth"] for row in rows]),
        "resolved": len(resolved) / count,
        "resolved_within_2x": sum(map(is_near, rows)) / count,
        "bound_below_truth": sum(covers(row, "truth") for row in bounds) / count,
        "covered": sum(covers(row, "truth") for row in rows) / count,
        "covered_at_point": sum(covers(row, "at_point") for row in rows) / count,
        "steps": statistics.median(row["estimate"]["steps"] for row in rows),
        "averages_within_2x": sum(within_2x(r["averages"], r["truth"]) for r in rows) / count,
    }
    if resolved:
        result["over_truth"] = spread([row["estimate"]["b_s"] / row["truth"] for row in resolved])
        result["corrected_over_truth"] = spread([corrected(r, n) / r["truth"] for r in resolved])
    if bounds:
        result["bound_over_truth"] = spread([r["estimate"]["low"] / r["truth"] for r in bounds])
    if rows[0]["divebatch"] is not None:
        result["divebatch_over_truth"] = spread([row["divebatch"] / row["truth"] for row in rows])
    return result


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.0, 0.5, 1.0]).tolist()
    return {"min": low, "median": middle, "max": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=["run", "summary"])
    parser.add_argument("--log", type=Path, required=True, help="a JSON line per training")
    parser.add_argument("--data", type=Path, default=os.environ.get("HPCTRAIN_DATA"))
    parser.add_argument("--problems", nargs="*", default=list(TRAININGS), choices=TRAININGS)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/noise_scale.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "run":
        run(args.log, args.data, args.problems, args.trials)
        return
    record = {
        "near": NEAR,
        "problems": summarise(args.log),
        "simulation": simulate(),
        "machine": describe_machine(),
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
