"""One rank is slowed down: how many steps the others still make, and how long they wait.

    python -m benchmarks.straggler [--ranks 4] [--seconds 30] [--factor 4] [--out FILE.json]

Computing is emulated by sleeping (20 ms a step, the slow rank `factor` times that), so that a slow
rank frees no core and ranks share none. Every rank notes when its model is entered and left; what
lies between leaving it and entering it again is everything that is not the model: waiting, sending,
updating. A system's rate is compared with its own rate without a slow rank; what lies outside the
model is also given as a share of the time.
"""

from __future__ import annotations

import argparse
import contextlib
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
from hpctrain.errors import EXIT_STOPPED
from hpctrain.toml_text import to_toml

ROOT = Path(__file__).resolve().parents[1]
STEP_S = 0.02
SKIPPED_S = 2.0
"""Of a rank's first seconds, which do not count."""

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
    with tempfile.TemporaryDirectory() as name:
        args = {"folder": name, "slow_rank": ranks - 1, "factor": factor}
        tree = tables | {
            "data": {"kind": "digits"},
            "model": {"kind": "benchmarks.straggler:sleeping", "args": args},
            "lr": {"base": 0.02},
            "batch": {"batch_global": 16 * ranks},
            "train": {"steps": 1_000_000, "threads": 1},
            "evaluate": {"every_epochs": 0.0, "replicas": "never"},
            "record": {"progress": "none"},
        }
        config = Path(name) / "straggler.toml"
        config.write_text(to_toml(from_mapping(tree).run))
        words = [sys.executable, "-m", "hpctrain", "train", str(config), "--out", f"{name}/run"]
        notes = [Path(name) / f"rank{rank}" for rank in range(ranks)]
        with open(Path(name) / "log", "w+") as log:
            command = ["tools/launch", str(ranks), "--", *words]
            job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            while job.poll() is None and not all(path.exists() for path in notes):
                time.sleep(0.1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(seconds)
            (Path(name) / "run" / "STOP").touch()
            if job.wait() != EXIT_STOPPED:
                log.seek(0)
                raise RuntimeError(f"code {job.returncode}\n{log.read()[-4000:]}")
        return [read_notes(path) for path in notes]


def read_notes(path: Path) -> dict[str, float]:
    """One rank's steps per second, and what share of them lay outside its model."""
    times = [tuple(map(float, line.split())) for line in path.read_text().splitlines()]
    late = [time for time in times if time[0] > times[0][0] + SKIPPED_S]
    steps = [b[0] - a[0] for a, b in zip(late, late[1:], strict=False)]
    outside = [b[0] - a[1] for a, b in zip(late, late[1:], strict=False)]
    return {
        "steps": len(times),
        "steps_per_s": len(steps) / sum(steps),
        "outside_share": sum(outside) / sum(steps),
        "outside_ms": 1e3 * statistics.median(outside),
    }


def main() -> None:
    """Measure all systems with and without a slow rank, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run")
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
