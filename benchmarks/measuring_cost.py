"""What measuring gradient noise costs: time, bytes and memory, `batch.measure` auto against off.

    python -m benchmarks.measuring_cost --data DIR [--ranks 2] [--steps 120] --out FILE.json

Per model and batch two jobs under mpirun that differ in `batch.measure` alone. The cost is what
timers around the added code say (`measure_share` of metrics.jsonl, the median over the second half
of its lines), as a share of a step; `every` is how many steps apart measured steps are by then.
Bytes are the run's, the sum over ranks; memory is the largest resident set of any rank. Losses must
be equal to the last bit: what is measured is not changed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

MODELS: dict[str, dict[str, Any]] = {
    "cnn": {"config": "configs/fashion-cnn.toml", "set": []},
    "mlp": {
        "config": "configs/fashion-cnn.toml",
        "set": ['model.kind="mlp"', "model.widths=[1024,1024]"],
    },
    "gpt": {"config": "configs/shakespeare-gpt.toml", "set": []},
}
"""All of at least 0.2 million parameters."""
LIMITS = {32: 0.02, 128: 0.01}
"""Samples per rank -> share of a step."""


def run(name: str, per_rank: int, measure: str, args: argparse.Namespace) -> dict[str, Any]:
    """One job; its metrics and its largest rank."""
    model = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *model["set"],
            f"batch.batch_global={per_rank * args.ranks}",
            f'batch.measure="{measure}"',
            f"train.steps={args.steps}",
            "evaluate.every_epochs=0",
            f'data.root="{args.data}"',
            'record.progress="none"',
        ]
        overrides = [word for setting in settings for word in ("--set", setting)]
        hpctrain = [sys.executable, "-m", "hpctrain", "train", model["config"], *overrides]
        job = [sys.executable, "-m", "benchmarks.measuring_cost", "--rank", f"{folder}/rss"]
        subprocess.run(
            ["tools/launch", str(args.ranks), "--", *job, *hpctrain, "--out", f"{folder}/run"],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=1200,
        )
        text = Path(folder, "run/metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        steps = [line for line in lines if line["kind"] == "step"]
        largest = max(int(path.read_text()) for path in Path(folder).glob("rss.*"))
    later = [line for line in steps if line["step"] > args.steps // 2]
    shares = [line["measure_share"] for line in later if line["measure_share"]]
    return {
        "losses": [line["loss"] for line in steps],
        "step_s": statistics.median(line["step_s"] for line in later),
        "bytes": sum((line["bytes_sent_intra"] or 0) for line in later),
        "share": statistics.median(shares) if shares else None,
        "every": later[-1]["measure_every"],
        "rss_bytes": largest,
    }


def be_rank(report: str, command: list[str]) -> int:
    """Run one rank and write down the most memory it held."""
    code = subprocess.run(command).returncode
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    Path(f"{report}.{rank}").write_text(str(kilobytes * 1024))
    return code


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(be_rank(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for per_rank, limit in LIMITS.items():
            off, on = (run(name, per_rank, measure, args) for measure in ("off", "auto"))
            rows.append(
                {
                    "model": name,
                    "samples_per_rank": per_rank,
                    "share": on["share"],
                    "every": on["every"],
                    "limit": limit,
                    "within_limit": on["share"] <= limit,
                    "step_s": {"off": off["step_s"], "auto": on["step_s"]},
                    "more_bytes": on["bytes"] - off["bytes"],
                    "more_rss_bytes": on["rss_bytes"] - off["rss_bytes"],
                    "rss_bytes": off["rss_bytes"],
                    "equal_losses": on["losses"] == off["losses"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "what": "time, bytes and memory that measuring gradient noise costs",
        "machine": describe_machine(),
        "settings": {"ranks": args.ranks, "steps": args.steps},
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
