"""Decentralised SGD against exact averaging, in the manner of Zhu et al. 2023, on a small scale.

    python -m benchmarks.decentralised run --log LOG.jsonl [--seeds 5]
    python -m benchmarks.decentralised check --log CHECK.jsonl
    python -m benchmarks.decentralised summary --log LOG.jsonl --checks CHECK.jsonl --out FILE.json

16 replicas, an MLP on the first 4,096 images of Fashion-MNIST, 200 steps whatever the batch, step
size in proportion to the batch and divided by 10 after 40 % and 80 % of the steps, warm-up over the
first 1 %: the recipe of arXiv 2306.02913, there with ResNets and 6,000 steps. `csgd` sums gradients
over all ranks at every step; the graphs are those of [[sync]] kind = "gossip", order = "before".
`sam` is `csgd` with average-direction noise of the length that the consensus distance of `ring` had
with the same seed, phase by phase.

`run` takes the batched form of hpctrain's arithmetic (benchmarks.batched); `check` trains seed 0 by
hpctrain itself, its ranks on threads. Both append a line per finished training and skip those that
the log has; `summary` takes the logs as they are. Sharpness: benchmarks.sharpness.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import batched
from benchmarks.machine import describe_machine
from benchmarks.sharpness import examine
from hpctrain.api import run_on
from hpctrain.assemble import Options, World
from hpctrain.config import from_mapping
from hpctrain.transport.threads import run_threads

REPLICAS = 16
SAMPLES = 4096
"""Training images, the first of the set."""
STEPS = 200
WARMUP_STEPS = 2
PHASES = [80, 160, 200]
"""Steps after which a phase of constant step size ends."""
LOOK_AT = [80, 200]
"""Steps after which replicas are examined: the end of the first phase, and of training."""
CURVE_EVERY = 4
"""Steps between two points of a recorded curve."""


Runs = dict[tuple[str, str, int], Any]
"""By setting, system and seed."""


@dataclass(frozen=True)
class Setting:
    """What all systems that are compared have in common."""

    batch_global: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0


GRAPHS = ["ring", "grid", "exponential", "one_peer"]
SETTINGS = {
    "large": (Setting(2048, 0.8), ["csgd", *GRAPHS, "sam"]),
    "large, momentum": (Setting(2048, 0.08, 0.9), ["csgd", "ring"]),
    "large, decay": (Setting(2048, 0.8, 0.0, 5e-4), ["csgd", "ring"]),
    "large, both": (Setting(2048, 0.08, 0.9, 5e-4), ["csgd", "ring", "exponential"]),
    "large, lr 0.4": (Setting(2048, 0.4), ["csgd", "ring", "sam"]),
    "small": (Setting(256, 0.1), ["csgd", "ring", "exponential"]),
}
"""With momentum the step size is a tenth: lr / (1 - momentum) stays."""

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, two-sided 95 %, by degrees of freedom."""


def tables(setting: Setting, system: str, seed: int) -> dict[str, Any]:
    """The run's configuration."""
    milestones = [steps * setting.batch_global / SAMPLES for steps in PHASES[:-1]]
    tree: dict[str, Any] = {
        "name": "decentralised",
        "seed": seed,
        "data": {
            "kind": "idx",
            "folder": "fashion-mnist",
            "limit_train": SAMPLES,
            "prefetch": 0,
        },
        "model": {"kind": "mlp", "widths": [64]},
        "optimiser": {"momentum": setting.momentum, "weight_decay": setting.weight_decay},
        "lr": {
            "base": setting.lr,
            "schedule": "step",
            "milestones": milestones,
            "warmup_samples": WARMUP_STEPS * setting.batch_global,
        },
        "batch": {"batch_global": setting.batch_global},
        "train": {"steps": STEPS, "device": "cpu", "threads": 1},
        "evaluate": {"every_epochs": 0.0, "every_steps": PHASES[0], "replicas": "always"},
        "record": {"progress": "none"},
        "exchange": {"kind": "dense"},
    }
    if system not in ("csgd", "sam"):
        tree["exchange"] = {"kind": "none"}
        tree["sync"] = [{"kind": "gossip", "graph": system, "every": 1}]
    return tree


def noise_lengths(ring: dict[str, Any]) -> dict[int, float]:
    """First step of each phase -> root mean square of the ring's consensus distance in it."""
    starts = [0, *PHASES[:-1]]
    found = {}
    for start, stop in zip(starts, PHASES, strict=True):
        squares = [d * d for steps, d in ring["distances"] if start < steps <= stop]
        found[start] = math.sqrt(statistics.mean(squares))
    return found


def measure(tree: dict[str, Any], task: batched.Task, lengths: dict[int, float]) -> dict[str, Any]:
    """Train in batched form and look at what came out."""
    run = from_mapping(tree).run
    result: dict[str, Any] = {"evaluations": {}, "landscape": {}, "distances": [], "losses": []}
    for moment in batched.train(run, task, REPLICAS, lengths):
        if moment.steps % CURVE_EVERY == 0:
            result["distances"].append([moment.steps, moment.distance])
            result["losses"].append([moment.steps, moment.training_loss])
        if not math.isfinite(moment.training_loss):
            return {"diverged": moment.steps}
        if moment.steps in LOOK_AT:
            result["evaluations"][str(moment.steps)] = evaluations(moment.replicas, task)
            result["landscape"][str(moment.steps)] = landscape(moment.replicas, task, run.seed)
    return result


def evaluations(replicas: batched.Replicas, task: batched.Task) -> dict[str, float]:
    """The average of the replicas and every one of them on the held-out set."""
    losses, accuracies = replicas.evaluate(replicas.params_RP.mean(0, keepdim=True), task.test)
    found = {"loss": float(losses), "accuracy": float(accuracies)}
    if len(replicas.params_RP) > 1:
        for name, values_R in zip(
            ("loss", "accuracy"), replicas.evaluate(replicas.params_RP, task.test), strict=True
        ):
            found |= {
                f"replica_{name}_min": float(values_R.min()),
                f"replica_{name}_mean": float(values_R.mean()),
                f"replica_{name}_max": float(values_R.max()),
            }
    return found


def landscape(replicas: batched.Replicas, task: batched.Task, seed: int) -> dict[str, float]:
    inputs, targets = task.train

    def loss(params_P: torch.Tensor) -> torch.Tensor:
        return replicas.loss(params_P[None], inputs[None], targets[None])

    return examine(loss, replicas.params_RP, seed)


def jobs(seeds: int) -> Iterator[tuple[str, str, int]]:
    """Setting, system and seed of every training; `ring` stands before `sam`."""
    for name, (_, systems) in SETTINGS.items():
        for seed in range(seeds):
            for system in systems:
                yield name, system, seed


def read_log(path: Path) -> Runs:
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {(line["setting"], line["system"], line["seed"]): line for line in found}


def append(log: Path, name: str, system: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    line = {"setting": name, "system": system, "seed": seed, **found}
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")
    end = found.get("evaluations", {}).get(str(STEPS))
    print(name, system, seed, end and end["accuracy"], flush=True)
    return line


def run_all(log: Path, seeds: int) -> None:
    """Train what the log lacks."""
    done = read_log(log)
    task = None
    for name, system, seed in jobs(seeds):
        if (name, system, seed) in done:
            continue
        tree = tables(SETTINGS[name][0], system, seed)
        task = task or batched.Task.of(from_mapping(tree).run)
        lengths = noise_lengths(done[name, "ring", seed]) if system == "sam" else {}
        found = measure(tree, task, lengths)
        done[name, system, seed] = append(log, name, system, seed, found)


def check_all(log: Path) -> None:
    """Train seed 0 of everything but `sam` by hpctrain itself."""
    done = read_log(log)
    for name, system, seed in jobs(1):
        if (name, system, seed) not in done and system != "sam":
            found = by_hpctrain(tables(SETTINGS[name][0], system, seed))
            append(log, name, system, seed, {"evaluations": found})


def by_hpctrain(tree: dict[str, Any]) -> dict[str, Any]:
    """Evaluations by step."""
    loaded = from_mapping(tree)
    with (
        tempfile.TemporaryDirectory() as parent,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        options = Options(out=Path(parent) / "run")
        run_threads(REPLICAS, lambda comm: run_on(World(comm), loaded, options), only_waits=True)
        text = (Path(parent) / "run" / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "eval"]
    return {str(line["step"]): {k: line[k] for k in ("loss", "accuracy")} for line in lines}


def interval(values: list[float]) -> dict[str, Any]:
    """Mean, half the width of its 95 % interval (Student's t), and the values."""
    half = None
    if len(values) > 1:
        half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {
        "mean": statistics.mean(values),
        "half_width_95": half,
        "values": [float(f"{value:.6g}") for value in values],
    }


def summarise(done: Runs) -> dict[str, Any]:
    """Per setting and system: accuracy, gap to csgd by seed, and what else was measured."""
    settings = {}
    for name, (setting, systems) in SETTINGS.items():
        runs = {
            system: {seed: run for (n, s, seed), run in done.items() if (n, s) == (name, system)}
            for system in systems
        }
        settings[name] = {
            "setting": asdict(setting),
            "systems": {
                system: describe(found, runs["csgd"]) for system, found in runs.items() if found
            },
        }
    return {
        "replicas": REPLICAS,
        "samples": SAMPLES,
        "steps": STEPS,
        "phases": PHASES,
        "settings": settings,
    }


def describe(runs: dict[int, Any], exact: dict[int, Any]) -> dict[str, Any]:
    """One system's runs by seed, beside those of exact averaging."""
    ended = {seed: run for seed, run in runs.items() if "diverged" not in run}
    result: dict[str, Any] = {"seeds": sorted(runs), "diverged": len(runs) - len(ended)}
    if not ended:
        return result
    pairs = [(run, exact[seed]) for seed, run in ended.items() if "evaluations" in exact[seed]]
    if runs is not exact and pairs:
        result["minus_csgd"] = {
            "accuracy": interval([at_end(run) - at_end(other) for run, other in pairs]),
            "top_eigenvalue": interval([top(run) - top(other) for run, other in pairs]),
        }
    for what in ("evaluations", "landscape"):
        result[what] = {
            str(step): intervals([run[what][str(step)] for run in ended.values()])
            for step in LOOK_AT
        }
    curves = [run["distances"] for run in ended.values()]
    if curves[0][-1][1]:
        result["distances"] = [
            [points[0][0], statistics.mean(d for _, d in points)]
            for points in zip(*curves, strict=True)
        ]
    return result


def compare(done: Runs, checks: Runs) -> list[dict[str, Any]]:
    """What hpctrain itself and the batched form reached."""
    found = []
    for key, check in checks.items():
        if key not in done:
            continue
        ours, batch = (r["evaluations"][str(STEPS)] for r in (check, done[key]))
        names = dict(zip(("setting", "system", "seed"), key, strict=True))
        for measured in ("loss", "accuracy"):
            names |= {measured: ours[measured], f"batched_{measured}": batch[measured]}
        found.append(names)
    return found


def at_end(run: dict[str, Any]) -> float:
    accuracy: float = run["evaluations"][str(STEPS)]["accuracy"]
    return accuracy


def top(run: dict[str, Any]) -> float:
    value: float = run["landscape"][str(STEPS)]["top_eigenvalue"]
    return value


def intervals(found: list[dict[str, float]]) -> dict[str, Any]:
    """Of every number, over runs."""
    return {key: interval([one[key] for one in found]) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=["run", "check", "summary"])
    parser.add_argument("--log", type=Path, required=True, help="a JSON line per training")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--checks", type=Path, help="the log of `check`, for `summary`")
    parser.add_argument("--out", type=Path, help="the record that `summary` writes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "run":
        run_all(args.log, args.seeds)
    elif args.verb == "check":
        check_all(args.log)
    else:
        done, checks = read_log(args.log), read_log(args.checks)
        record = summarise(done) | {
            "checks": compare(done, checks),
            "machine": describe_machine(),
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
