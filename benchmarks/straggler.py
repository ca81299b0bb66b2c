"""One rank is slowed down: how many steps the others still make, and how long they wait.

    python -m benchmarks.straggler [--ranks 4] [--seconds 20] [--factor 4] [--out FILE.json]

Computing is emulated by sleeping (20 ms a step, the slow rank `factor` times that), so that a slow
rank frees no core and ranks share none. Every rank notes when its model is entered and left; what
lies between leaving it and entering it again is everything that is not the model: waiting, sending,
updating. A system's rate is compared with its own rate without a slow rank.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from hpctrain.config import from_mapping
from hpctrain.data.spec import Spec
from hpctrain.toml_text import to_toml

ROOT = Path(__file__).resolve().parents[1]
STEP_S = 0.02
SKIPPED = 50
"""First steps of a rank that do not count."""

LEADER = {"kind": "leader", "every": 16, "pull": 0.5}
SYSTEMS: dict[str, dict[str, Any]] = {
    "synchronous, dense": {"exchange": {"kind": "dense", "dense_backend": "mpi"}},
    "Leader SGD": {"exchange": {"kind": "none"}, "sync": [LEADER]},
    "Leader SGD, total steps": {
        "exchange": {"kind": "none"},
        "sync": [LEADER | {"unit": "total_steps"}],
    },
    "Leader SGD, asynchronous": {
        "exchange": {"kind": "none"},
        "sync": [LEADER | {"asynchronous": True}],
    },
    "EASGD, asynchronous": {
        "exchange": {"kind": "none"},
        "sync": [{"kind": "elastic", "every": 16, "asynchronous": True}],
    },
}


class Sleeper(nn.Module):
    """An MLP that sleeps before it computes, and notes when it was entered and left."""

    def __init__(self, spec: Spec, sleep_s: float, notes: Path) -> None:
        super().__init__()
        n_inputs = math.prod(spec.input_shape)
        self.layers = nn.Sequential(nn.Linear(n_inputs, 512), nn.ReLU(), nn.Linear(512, 10))
        self._sleep_s = sleep_s
        self._notes = notes

    def forward(self, inputs: Tensor) -> Tensor:
        entered = time.monotonic()
        if self.training:
            time.sleep(self._sleep_s)
        outputs: Tensor = self.layers(inputs.flatten(1))
        if self.training:
            with open(self._notes, "a") as file:
                file.write(f"{entered} {time.monotonic()}\n")
        return outputs


def sleeping(spec: Spec, folder: str, slow_rank: int, factor: float) -> nn.Module:
    """The model of this benchmark, on the rank that the launcher says this is."""
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    sleep_s = STEP_S * (factor if rank == slow_rank else 1.0)
    return Sleeper(spec, sleep_s, Path(folder) / f"rank{rank}")


def run(
    tables: dict[str, Any], ranks: int, seconds: float, factor: float
) -> list[dict[str, float]]:
    """Every rank's steps per second and share of the time outside its model."""
    slow = ranks - 1
    with tempfile.TemporaryDirectory() as name:
        args = {"folder": name, "slow_rank": slow, "factor": factor}
        tree = tables | {
            "data": {"kind": "digits"},
            "model": {"kind": "benchmarks.straggler:sleeping", "args": args},
            "lr": {"base": 0.02},
            "batch": {"batch_global": 16 * ranks},
            "train": {"steps": int(seconds / STEP_S / factor), "threads": 1},
            "evaluate": {"every_epochs": 0.0, "replicas": "never"},
            "record": {"progress": "none"},
            "checkpoint": {"at_end": False},
        }
        config = Path(name) / "straggler.toml"
        config.write_text(to_toml(from_mapping(tree).run))
        words = [sys.executable, "-m", "hpctrain", "train", str(config), "--out", f"{name}/run"]
        subprocess.run(["tools/launch", str(ranks), "--", *words], cwd=ROOT, check=True)
        found = []
        for rank in range(ranks):
            lines = (Path(name) / f"rank{rank}").read_text().splitlines()[SKIPPED:]
            times = [tuple(map(float, line.split())) for line in lines]
            steps = [b[0] - a[0] for a, b in zip(times, times[1:], strict=False)]
            outside = [b[0] - a[1] for a, b in zip(times, times[1:], strict=False)]
            found.append(
                {
                    "steps": len(lines) + SKIPPED,
                    "steps_per_s": len(steps) / sum(steps),
                    "outside_share": sum(outside) / sum(steps),
                    "outside_ms": 1e3 * statistics.median(outside),
                }
            )
        return found


def main() -> None:
    """Measure all systems with and without a slow rank, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run, about")
    parser.add_argument(
        "--factor", type=float, default=4.0, help="how much slower the last rank is"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    systems = {}
    for name, tables in SYSTEMS.items():
        even = run(tables, args.ranks, args.seconds, 1.0)
        slowed = run(tables, args.ranks, args.seconds, args.factor)
        kept = [
            after["steps_per_s"] / before["steps_per_s"]
            for before, after in zip(even[:-1], slowed[:-1], strict=True)
        ]
        waits = [
            after["outside_share"] - before["outside_share"]
            for before, after in zip(even[:-1], slowed[:-1], strict=True)
        ]
        systems[name] = {"kept": kept, "waits": waits, "even": even, "slowed": slowed}
        print(f"{name:28} the others keep {min(kept):.1%}, wait {max(waits):.1%} of the time")
    record = {"step_s": STEP_S, "factor": args.factor, "systems": systems}
    if args.out:
        args.out.write_text(json.dumps(record | {"machine": describe_machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
