"""Bits to a target: a tuned count of kept entries against fixed ones; and xi along training.

    python -m benchmarks.density --data DIR --out benchmarks/results/density.json

Logistic regression on w8a (300 features, l2 1e-4), rows dealt to 4 nodes of equal size, no
mini-batches. Each node compresses its own gradient g_i, the mean of what they send is applied with
the paper's step: x <- x - mean_i(s_i) / L, where s_i carries the factor sqrt(beta / T) of `sign`
(s_i = mean|g_I| sign(g_I)) or omega of `stochastic` (Khirirat et al. 2021, arXiv 2003.06377).
Steps and bits to a target are interpolated (in the logarithm of the gap) between checks.

xi: see benchmarks/xi.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.logistic import L2, Logistic, read_w8a
from benchmarks.machine import describe_machine
from benchmarks.xi import xi_mnist, xi_w8a
from hpctrain.exchange.density import BitCost, PacketCost, best_count, descent, payload_bits

NODES = 4
TARGETS = [0.2, 0.1, 0.05]
"""Of (f - f*) / (f(0) - f*)."""
LIMIT = 1.05
CHECK = 5
COSTS = {
    "bits": BitCost(1.0, 0.0),
    "bits + 512": BitCost(1.0, 512.0),
    "packets": PacketCost(8.0 * 576, 8.0 * 64, 8 * 512),
}
"""Bits alone; with a header of 64 bytes; packets of 512 bytes that cost 576, a message 64 more."""
COUNTS = sorted({*range(1, 32), *range(32, 128, 2), *range(128, 301, 4), 99, 198, 297})
CASES = {
    "top": ("top", False, COUNTS, 7000, 1),
    "sign": ("sign", False, COUNTS, 7000, 1),
    "stochastic": ("stochastic", False, sorted({*range(8, 301, 8), 99, 198, 297}), 5000, 3),
    "top + feedback": ("top", True, COUNTS, 2000, 1),
}
"""Compressor, error feedback, fixed counts, most steps, seeds."""

Rule = Callable[[np.ndarray], int]


def tuned(compressor: Any, cost: Any) -> Rule:
    return lambda magnitudes: best_count(magnitudes, len(magnitudes), compressor, cost)


def compress(compressor: str, a: np.ndarray, counts: np.ndarray, rng: Any) -> np.ndarray:
    """What nodes send: (nodes, B, n) from (nodes, B, n) and (nodes, B) counts."""
    size = np.abs(a)
    ranks = np.argsort(np.argsort(-size, axis=2, kind="stable"), axis=2)
    if compressor != "stochastic":
        kept = np.where(ranks < counts[..., None], a, 0.0)
        if compressor == "top":
            return kept
        return np.sign(kept) * (np.abs(kept).sum(2) / counts)[..., None]
    chance = np.zeros_like(a)
    for place in np.ndindex(counts.shape):
        g = np.sort(size[place])[::-1]
        rest = np.cumsum(g[::-1])[::-1]
        sure = int(np.sum(np.arange(len(g)) + rest / np.maximum(g, 1e-300) < counts[place]))
        if sure == len(g) or rest[sure] == 0.0:
            chance[place] = 1.0
        else:
            scale = (counts[place] - sure) / rest[sure]
            chance[place] = np.clip(scale * size[place], 1e-300, 1.0)
    drawn = np.where(rng.random(a.shape) < chance, a / chance, 0.0)
    noise = (a * a / chance).sum(2)
    return drawn * ((a * a).sum(2) / noise)[..., None]


def train(
    problem: Logistic, compressor: str, feedback: bool, rules: list[Rule], steps: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Runs side by side, each to the last target. Per run: gap by check, (steps, nodes) counts."""
    rng = np.random.default_rng(seed)
    x_NB = np.zeros((problem.n, len(rules)))
    residual = np.zeros((len(problem.shards), len(rules), problem.n))
    active = np.arange(len(rules))
    gaps: list[list[float]] = [[] for _ in rules]
    counts: list[list[np.ndarray]] = [[] for _ in rules]
    for step in range(steps + 1):
        gradients, losses = problem.gradients(x_NB)
        if step % CHECK == 0:
            gap = (losses - problem.least) / problem.gap_at_zero
            for run, value in zip(active, gap, strict=True):
                gaps[run].append(float(value))
            going = gap > TARGETS[-1]
            active, x_NB, residual = active[going], x_NB[:, going], residual[:, going]
            gradients = gradients[:, going]
        if not len(active):
            break
        a = gradients + residual
        chosen = np.array([[rules[run](np.abs(g)) for run, g in zip(active, node)] for node in a])  # noqa: B905
        sent = compress(compressor, a, chosen, rng)
        if feedback:
            residual = a - sent
        x_NB = x_NB - sent.mean(0).T / problem.smoothness
        for place, run in enumerate(active):
            counts[run].append(chosen[:, place])
    return [(np.array(gap), np.array(kept)) for gap, kept in zip(gaps, counts, strict=True)]


def to_target(
    run: tuple[np.ndarray, np.ndarray], compressor: Any, cost: Any, target: float, n: int
) -> tuple[float, float]:
    """Steps and cost until the target; infinite if it is not reached."""
    gap, counts = run
    reached = np.flatnonzero(gap <= target)
    if not len(reached):
        return np.inf, np.inf
    after = int(reached[0])
    part = np.log(gap[after - 1] / target) / np.log(gap[after - 1] / gap[after])
    steps = CHECK * (after - 1 + part)
    spent = cost.cost(payload_bits(compressor, counts.ravel().astype(float), n))
    spent = np.cumsum(spent.reshape(counts.shape).sum(1))
    return float(steps), float(np.interp(steps, np.arange(len(spent) + 1), [0.0, *spent]))


def study(problem: Logistic, name: str) -> dict[str, Any]:
    """One case: the fixed counts and the tuned one, for every cost and target."""
    compressor, feedback, counts, most, seeds = CASES[name]
    rules = [lambda _, count=count: count for count in counts]
    rules += [tuned(compressor, cost) for cost in COSTS.values()]
    runs = [train(problem, compressor, feedback, rules, most, seed) for seed in range(seeds)]
    result: dict[str, Any] = {"counts": list(counts), "most_steps": most, "seeds": seeds}
    for place, (label, cost) in enumerate(COSTS.items()):
        chosen = np.concatenate([found[len(counts) + place][1].ravel() for found in runs])
        entry: dict[str, Any] = {"tuned_counts": np.percentile(chosen, [5, 50, 95]).tolist()}
        for target in TARGETS:
            spent = np.median(
                [
                    [to_target(r, compressor, cost, target, problem.n) for r in found]
                    for found in runs
                ],
                axis=0,
            )
            best = int(np.argmin(spent[: len(counts), 1]))
            ours = spent[len(counts) + place]
            entry[str(target)] = {
                "best_count": counts[best],
                "best_steps": finite(spent[best, 0]),
                "best_cost": finite(spent[best, 1]),
                "tuned_steps": finite(ours[0]),
                "tuned_cost": finite(ours[1]),
                "ratio": finite(ours[1] / spent[best, 1]),
                "cost_of_counts": [finite(value) for value in spent[: len(counts), 1]],
            }
        result[label] = entry
        ratios = {target: entry[str(target)]["ratio"] for target in TARGETS}
        print(name, label, entry["tuned_counts"], ratios, file=sys.stderr, flush=True)
    return result


def finite(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def patient(power: float, cost: Any) -> Rule:
    """A rule that minds the cost less: argmax of descent^power / cost."""

    def rule(magnitudes: np.ndarray) -> int:
        counts = np.arange(1.0, len(magnitudes) + 1)
        gain = descent("top", np.sort(magnitudes)[::-1], counts) ** power
        return 1 + int(np.argmax(gain / cost.cost(payload_bits("top", counts, len(magnitudes)))))

    return rule


def tries(folder: Path, problem: Logistic) -> dict[str, Any]:
    """What was tried where the tuned count missed: `top` with headers of 64 bytes."""
    cost, counts = COSTS["bits + 512"], range(4, 161, 4)
    result: dict[str, Any] = {"counts": list(counts)}
    alone = Logistic(read_w8a(folder, 1))
    rows = {"one node": (alone, tuned("top", cost))}
    rows |= {f"descent^{power}": (problem, patient(power, cost)) for power in (1.25, 1.5, 2.0)}
    sweeps = {}
    for name, (where, rule) in rows.items():
        nodes = len(where.shards)
        if nodes not in sweeps:
            sweeps[nodes] = train(where, "top", False, [lambda _, k=k: k for k in counts], 3500, 0)
        (ours,) = train(where, "top", False, [rule], 3500, 0)
        result[name] = {}
        for target in TARGETS:
            spent = [to_target(run, "top", cost, target, where.n)[1] for run in sweeps[nodes]]
            ratio = to_target(ours, "top", cost, target, where.n)[1] / min(spent)
            best = counts[int(np.argmin(spent))]
            result[name][str(target)] = {"best_count": best, "ratio": finite(ratio)}
        print("try", name, result[name], file=sys.stderr, flush=True)
    return result


def seconds_of_a_proposal() -> dict[str, float]:
    sample = np.abs(np.random.default_rng(0).standard_t(3, 1 << 16)).astype(np.float32)
    result = {}
    for compressor in ("top", "sign", "stochastic"):
        took = []
        for _ in range(9):
            start = time.perf_counter()
            best_count(sample, 10_000_000, compressor, BitCost(1.0, 1e6))  # type: ignore[arg-type]
            took.append(time.perf_counter() - start)
        result[compressor] = round(float(np.median(took)), 5)
    return result


def measure(folder: Path) -> dict[str, Any]:
    problem = Logistic(read_w8a(folder, NODES))
    return {
        "machine": describe_machine(),
        "problem": {
            "data": "w8a", "nodes": NODES, "rows_per_node": problem.shards[0].shape[0],
            "n": problem.n, "l2": L2, "smoothness": problem.smoothness, "least": problem.least,
            "gradient_at_least": problem.residual_gradient, "targets": TARGETS, "limit": LIMIT,
        },
        "costs": {label: str(cost) for label, cost in COSTS.items()},
        "proposal_s": seconds_of_a_proposal(),
        "xi": {"w8a": xi_w8a(problem), "mnist": xi_mnist(folder)},
        "cases": {name: study(problem, name) for name in CASES},
        "tries": tries(folder, problem),
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    targets = [str(target) for target in TARGETS]
    titles = " | ".join(f"gap {target}" for target in targets)
    rows = [f"| case | cost | {titles} |", "|---|---|" + "---|" * len(targets)]
    for name, case in record["cases"].items():
        for label in COSTS:
            cells = []
            for target in targets:
                found = case[label][target]
                best = f"best T {found['best_count']}" if found["best_cost"] else "no fixed T"
                cells.append(f"{found['ratio'] or 'not reached'} ({best})")
            rows.append(f"| {name} | {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with libsvm/ and mnist/")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record = measure(args.data)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
