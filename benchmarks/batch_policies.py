"""Batch policies by time to a common target: four tasks on 4 nodes x 1 rank at 1 Gbit/s.

    time = alpha x steps + beta x samples to the target,   t(B) = alpha + beta B

Steps and samples are counted unshaped, on threads of one process; the line t(B) is fitted to steps
that were timed on a virtual cluster (root; tests/cluster), and it is what the policy `goodput` is
told. `shaped` repeats one training of it on the cluster, where it measures for itself.

The start batch has 8 samples per rank. The target is the held-out loss that it has at a given
number of samples, the mean over the seeds. Losses are averaged over the evaluations of a short span
of samples, also when it comes to who has arrived. The step size is chosen for the start batch, on a
seed of its own; all batches take it in proportion, where nothing else is said.

    python -m benchmarks.batch_policies lr     --log LOG [--tasks NAME ...]
    python -m benchmarks.batch_policies start  --log LOG
    python -m benchmarks.batch_policies times  --log LOG [--rate 1gbit] [--rounds 3]
    python -m benchmarks.batch_policies run    --log LOG [--methods NAME ...]
    python -m benchmarks.batch_policies final  --log LOG
    python -m benchmarks.batch_policies shaped --log LOG
    python -m benchmarks.batch_policies table  --log LOG [--out benchmarks/results/NAME.json]

Every finished training is a line of LOG; those that are there already are skipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.batch import cluster, report
from benchmarks.batch.runs import Case, Log, chosen_lr, once, target_of, tuning
from benchmarks.batch.tasks import FIXED_START, SEEDS, TASKS, methods

FINAL_SEEDS = range(5)


def choose_lr(args: argparse.Namespace, log: Log, task: str) -> None:
    """The grid of step sizes."""
    for case in tuning(task):
        once(log, case)


def start(args: argparse.Namespace, log: Log, task: str) -> None:
    """The start batch, which makes the target."""
    for seed in args.seeds:
        once(log, Case("start", task, FIXED_START, seed, chosen_lr(log, task)))


def run(args: argparse.Namespace, log: Log, task: str) -> None:
    """All other methods, seed by seed, so that a first answer is there early."""
    lr, target = chosen_lr(log, task), target_of(log, task, SEEDS)
    for seed in args.seeds:
        for method in args.methods or methods(TASKS[task]):
            if method != FIXED_START and method in methods(TASKS[task]):
                case = Case("run", task, method, seed, lr)
                times = cluster.fitted(log, task) if case.of_method.timed else None
                once(log, case, times=times, target=target)


def final(args: argparse.Namespace, log: Log, task: str) -> None:
    """Equal numbers of samples with a falling step size: the start batch and the policy."""
    for seed in FINAL_SEEDS:
        for method in (FIXED_START, "goodput"):
            case = Case("final", task, method, seed, chosen_lr(log, task))
            once(log, case, times=cluster.fitted(log, task))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    unshaped = {"lr": choose_lr, "start": start, "run": run, "final": final}
    shaped = {"times": cluster.time_steps, "shaped": cluster.train_shaped}
    parser.add_argument("command", choices=[*unshaped, *shaped, "table"])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of `run`; by default all")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--rate", default="1gbit", help="of each node's link")
    parser.add_argument("--steps", type=int, default=60, help="of each batch in `times`")
    parser.add_argument("--rounds", type=int, default=3, help="of `times`")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    log = Log(args.log)
    if args.command in shaped:
        shaped[args.command](args, log)
    elif args.command in unshaped:
        for task in args.tasks:
            unshaped[args.command](args, log, task)
    else:
        record = report.summarise(log, args.tasks)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(report.table(record))


if __name__ == "__main__":
    main()
