"""Full trainings of the example configurations, with what they reached and how long they took.

python -m benchmarks.training --data DIR [--ranks 2] [--out FILE.json] [CONFIG ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

TARGETS = {
    "configs/fashion-cnn.toml": ("accuracy", 0.91),
    "configs/shakespeare-gpt.toml": ("loss", 1.9),
    "configs/cifar-resnet20.toml": ("accuracy", 0.60),
}


def train(config: str, data: str, ranks: int) -> dict[str, Any]:
    """One run: its last evaluation, seconds from launch to exit, samples per second."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = ["tools/launch", str(ranks), "--", sys.executable, "-m", "hpctrain", config]
        began = time.monotonic()
        subprocess.run(
            [*command, "--out", str(run)], check=True, env=os.environ | {"HPCTRAIN_DATA": data}
        )
        return read_record(run) | {"seconds": round(time.monotonic() - began, 1)}


def read_record(run: Path) -> dict[str, Any]:
    """What a run folder tells about a finished training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step" and line["samples_per_s"]]
    evals = [line for line in lines if line["kind"] == "eval"]
    rates = sorted(line["samples_per_s"] for line in steps)
    return {
        "steps": evals[-1]["step"],
        "epochs": evals[-1]["epoch"],
        "loss": evals[-1]["loss"],
        "accuracy": evals[-1]["accuracy"],
        "samples_per_s_median": round(rates[len(rates) // 2], 1),
        "exchange_fraction": round(
            sum(line["exchange_s"] for line in steps) / sum(line["step_s"] for line in steps), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=list(TARGETS))
    parser.add_argument("--data", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {}
    for config in args.configs:
        results[config] = train(config, args.data, args.ranks)
        if config in TARGETS:
            measure, target = TARGETS[config]
            results[config]["target"] = {measure: target}
    record = {"machine": describe_machine(), "ranks": args.ranks, "runs": results}
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
