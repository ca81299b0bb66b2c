"""Dense exchange side by side: hpctrain against a plain `hvd.DistributedOptimizer` script.

Two jobs of the same ranks, the same CNN, data and batch, take turns in blocks of steps; while one
computes, the other is frozen. The first job of each pair of blocks alternates. Reported: the paired
ratio of step times with its 95 % interval, and the time from `mpirun` to the end of the first step.

    python -m benchmarks.dense --data DIR [--ranks 2] [--blocks 24] [--steps 50] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe_machine

CNN = {"channels": [32, 64], "hidden": 128}
T_95 = {9: 2.262, 14: 2.145, 19: 2.093, 23: 2.069, 29: 2.045, 39: 2.023}


class Job:
    """One launched trainer whose ranks stop at gates."""

    def __init__(self, name: str, command: list[str], folder: Path, ranks: int) -> None:
        self.name, self._ranks, self._folder = name, ranks, folder
        for rank in range(ranks):
            for end in ("in", "out"):
                os.mkfifo(folder / f"{name}.{rank}.{end}")
        self.started = time.time()
        self._log = open(folder / f"{name}.log", "w")  # noqa: SIM115 - closed by finish
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._reports: list[dict[str, float]] = []

    def wait(self) -> list[dict[str, float]]:
        """Every rank's report at its gate."""
        reports = []
        for rank in range(self._ranks):
            with open(self._folder / f"{self.name}.{rank}.out") as pipe:
                line = pipe.readline()
            if not line:
                raise RuntimeError((self._folder / f"{self.name}.log").read_text()[-4000:])
            reports.append(json.loads(line))
        self._reports = reports
        return reports

    def go(self, word: str = "go") -> None:
        """Let every rank pass its gate."""
        for rank in range(self._ranks):
            with open(self._folder / f"{self.name}.{rank}.in", "w") as pipe:
                pipe.write(word + "\n")

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def finish(self) -> None:
        """End the job at its gate."""
        self.thaw()
        self.go("end")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _signal(self, number: int) -> None:
        for report in self._reports:
            os.kill(int(report["pid"]), number)


def block_s(job: Job) -> float:
    """Seconds of one block: the slowest rank's."""
    job.thaw()
    job.go()
    seconds = max(report["block_s"] for report in job.wait())
    job.freeze()
    return seconds


def start_job(name: str, args: argparse.Namespace, folder: Path) -> Job:
    """Launch one of the two trainers; returns at once."""
    python = [sys.executable, "-m"]
    if name == "plain":
        program = [
            *python, "benchmarks.plain_horovod", "--folder", str(folder), "--data", args.data,
            "--block", str(args.steps), "--batch", str(args.batch),
            "--channels", *map(str, CNN["channels"]), "--hidden", str(CNN["hidden"]),
        ]  # fmt: skip
    else:
        model = {"folder": str(folder), "job": "hpctrain", "block": args.steps} | CNN
        settings = [
            f"data.root={json.dumps(args.data)}",
            "model.kind=benchmarks.gate:gated_cnn",
            "model.args={" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in model.items()) + "}",
            f"batch.batch_global={args.batch}",
            "train.epochs=1000",
            "lr.base=0.05",
            "optimiser.nesterov=false",
            "optimiser.weight_decay=0",
            "evaluate.every_epochs=0",
            *args.set,
        ]
        program = [
            *python, "hpctrain", "train", "configs/fashion-cnn.toml",
            *[part for setting in settings for part in ("--set", setting)],
            "--out", str(folder / "run"),
        ]  # fmt: skip
    command = ["tools/launch", str(args.ranks), "--", *program]
    return Job(name, command, folder, args.ranks)


def first_step_s(name: str, args: argparse.Namespace) -> float:
    """Seconds from launch to the end of the first step, alone on the machine."""
    with tempfile.TemporaryDirectory() as folder:
        one = argparse.Namespace(**{**vars(args), "steps": 1})
        job = start_job(name, one, Path(folder))
        job.wait()
        job.go()
        ended = max(report["at"] for report in job.wait())
        job.finish()
        return ended - job.started


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of paired ratios and its two-sided 95 % bounds (Student's t on logs)."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    near = min(T_95, key=lambda freedom: abs(freedom - (len(logs) - 1)))
    half = T_95[near] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that holds fashion-mnist/")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = ["hpctrain", "plain"]
    starts: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.starts):
        for name in names:
            starts[name].append(first_step_s(name, args))
    steps: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for name in names:
            jobs[name] = start_job(name, args, Path(folder))
            jobs[name].wait()
            block_s(jobs[name])  # warm-up block, not counted
        for block in range(args.blocks):
            for name in names if block % 2 == 0 else names[::-1]:
                steps[name].append(block_s(jobs[name]) / args.steps)
        for job in jobs.values():
            job.finish()
    ratios = [a / b for a, b in zip(steps["hpctrain"], steps["plain"], strict=True)]
    mean, low, high = interval(ratios)
    start_ratio = statistics.median(starts["hpctrain"]) / statistics.median(starts["plain"])
    record = {
        "what": "hpctrain dense exchange through Horovod against hvd.DistributedOptimizer",
        "machine": describe_machine(),
        "settings": {
            "ranks": args.ranks,
            "batch_global": args.batch,
            "model": CNN,
            "blocks": args.blocks,
            "steps_per_block": args.steps,
            "set": args.set,
        },
        "step_ms_median": {n: 1e3 * statistics.median(steps[n]) for n in names},
        "step_ms": {n: [round(1e3 * s, 3) for s in steps[n]] for n in names},
        "step_ratio": {"geometric_mean": mean, "low_95": low, "high_95": high},
        "first_step_s": starts,
        "first_step_ratio_of_medians": start_ratio,
    }
    text = json.dumps(record, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
