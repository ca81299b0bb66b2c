"""configs/flagship.toml to a target, and the same with each axis switched off, one at a time.

    time = alpha x steps + beta x samples to the target,   t(B) = alpha + beta B

Steps and samples are counted unshaped, with 4 ranks as threads of this process, each a node of its
own. t(B) is the line through the seconds of a step at two fixed batches on a virtual cluster of 4
nodes x 1 rank (root; tests/cluster), a whole round of leaders included; the policy `goodput` is
told it. `whole` repeats one training on the cluster, where the policy measures for itself. The step
size is chosen for every variant from the same grid, on the first seed. Bytes are those that the
threads state, also for 4 nodes x 2 ranks.

    python -m benchmarks.flagship bytes  --log LOG
    python -m benchmarks.flagship shaped --log LOG [--rate 100mbit] [--rounds 1]
    python -m benchmarks.flagship count  --log LOG [--variants NAME ...]
    python -m benchmarks.flagship whole  --log LOG [--rate 100mbit]
    python -m benchmarks.flagship table  --log LOG [--out benchmarks/results/flagship.json]

`count` leaves variants whose batch changes out until `shaped` has been run. Every finished run is a
line of LOG; those that are there already are skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from benchmarks.axes import cluster, report
from benchmarks.axes.cases import FIXED, FLAGSHIP, LRS, SEEDS, TRAINED, VARIANTS, Case, Log
from benchmarks.axes.count import count, count_bytes


def bytes_stage(args: argparse.Namespace, log: Log) -> None:
    """Bytes between nodes, of every variant at both layouts."""
    for per_node in (1, 2):
        for variant in VARIANTS if per_node > 1 else TRAINED:
            key = Case(variant).key("bytes") | {"per_node": per_node}
            log.once(key, partial(count_bytes, variant, per_node))


def shaped(args: argparse.Namespace, log: Log) -> None:
    """Seconds of a step; variants take turns in rounds. A fixed batch has the flagship's steps."""
    with cluster.started(args.rate) as (up, folder):
        for turn in range(args.rounds):
            wanted = [variant for variant in args.variants if variant != FIXED]
            for variant in wanted[:: 1 if turn % 2 == 0 else -1]:
                for batch in args.batches:
                    key = Case(variant).key("shaped") | {"rate": args.rate, "shorter": args.shorter}
                    key |= {"batch": batch, "turn": turn}
                    log.once(
                        key, partial(cluster.time_steps, up, folder, variant, batch, args.shorter)
                    )


def count_stage(args: argparse.Namespace, log: Log) -> None:
    """The grid on the first seed, then the other seeds with its best step size."""
    for variant in args.variants:
        times = None
        if Case(variant).loaded().run.batch.adaptive:
            times = report.fitted(log, variant, args.rate)
            if times is None:
                print(f"{variant}: its batch goes by times; run shaped first", file=sys.stderr)
                continue
        told = report.told(times)
        cases = [Case(variant, lr, SEEDS[0]) for lr in args.lrs]
        for case in cases:
            log.once(case.key("count", *told), partial(count, case, times))
        lr = report.chosen_lr(log, variant, args.rate)
        for seed in args.seeds if lr is not None else ():
            case = Case(variant, lr or 0.0, seed)
            log.once(case.key("count", *told), partial(count, case, times))


def whole(args: argparse.Namespace, log: Log) -> None:
    """The flagship on the cluster to the target."""
    case = Case(FLAGSHIP, report.chosen_lr(log, FLAGSHIP, args.rate) or LRS[1])
    with cluster.started(args.rate) as (up, folder):
        key = case.key("whole") | {"rate": args.rate}
        log.once(key, partial(cluster.train_whole, up, folder, case))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    stages = {"bytes": bytes_stage, "shaped": shaped, "count": count_stage, "whole": whole}
    parser.add_argument("command", choices=[*stages, "table"])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=TRAINED, default=TRAINED)
    parser.add_argument("--lrs", nargs="+", type=float, choices=LRS, default=list(LRS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--rate", default="100mbit", help="of each node's link")
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1024], help="to be timed")
    parser.add_argument("--rounds", type=int, default=1, help="of `shaped`")
    parser.add_argument("--shorter", type=int, default=1, help="divides the steps of `shaped`")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    log = Log(args.log)
    if args.command in stages:
        stages[args.command](args, log)
        return
    record = report.summarise(log, args.rate)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(report.table(record))


if __name__ == "__main__":
    main()
