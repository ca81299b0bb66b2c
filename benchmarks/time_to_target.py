"""Time to target of whole trainings: hpctrain, Horovod, DDP with PowerSGD, side by side.

    time = steps to target x seconds of a step

Steps to target are counted unshaped on this host, with the same arithmetic: 3 seeds, the same grid
of learning rates for all systems, the held-out set measured every 25 steps, the target held twice
in a row. A step's seconds are the median of 200 steps on a virtual cluster (root; tests/cluster);
of replicas, which meet at few steps, the mean from step 32 on (--steps 224 holds whole rounds).
`final` compares the last evaluations of trainings of equal length, seed by seed. All systems start
from the same parameters and take the same samples in the same order.

Unshaped, hpctrain's ranks are threads of one process, and exchanges that are linear are computed by
one rank with the whole batch (`Task.batch_statistics` and `System.linear` say where that holds).

    python -m benchmarks.time_to_target steps  --log LOG --task fashion [--systems A B] [--seeds 0]
    python -m benchmarks.time_to_target shaped --log LOG --task fashion [--nodes 4 --per-node 1]
                                               [--rate 100mbit]
    python -m benchmarks.time_to_target full   --log LOG --task fashion --systems A --lrs 0.05
    python -m benchmarks.time_to_target final  --log LOG --task fashion --systems A --lrs 0.05
    python -m benchmarks.time_to_target table  --log LOG [--out FILE.json]

Every finished run is one line of LOG; those that are there already are skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.peers import report
from benchmarks.peers.job import Job, run
from benchmarks.peers.log import Log, key_of
from benchmarks.peers.tasks import SYSTEMS, TASKS


def count_steps(args: argparse.Namespace) -> None:
    """Unshaped runs to the target, seed by seed."""
    side_by_side(args, "steps", jobs(args, shaped=False))


def count_final(args: argparse.Namespace) -> None:
    """Unshaped runs of equal length whose step size falls to 0, evaluated at the end."""
    change: dict[str, Any] = {"evaluate": False, "to_target": False, "schedule": "cosine"}
    change["steps"] = args.steps or TASKS[args.task].final_steps
    changed = (dataclasses.replace(job, **change) for job in jobs(args, shaped=False))
    side_by_side(args, "final", changed)


def side_by_side(args: argparse.Namespace, what: str, wanted: Iterable[Job]) -> None:
    """Unshaped runs, so many at once as the command line says."""
    log = Log(args.log)
    with ThreadPoolExecutor(args.at_once) as pool:
        for done in [pool.submit(once, log, what, job) for job in wanted]:
            done.result()


def time_steps(args: argparse.Namespace) -> None:
    """Seconds of a step on the virtual cluster; the systems take turns in rounds."""
    from tests.cluster.cluster import Cluster

    log, task = Log(args.log), TASKS[args.task]
    middle = task.lrs[len(task.lrs) // 2]
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        with Cluster.up(args.nodes, args.rate, shared=(folder,)) as cluster:
            links = [str(link) for link in cluster.links]
            for turn in range(args.rounds):
                for system in args.systems[:: 1 if turn % 2 == 0 else -1]:
                    ranks = args.nodes * args.per_node
                    steps = args.steps or 200
                    job = Job(args.task, system, middle, turn, ranks, args.per_node, steps)
                    job = dataclasses.replace(job, evaluate=False, to_target=False)
                    where = {"cluster": cluster, "folder": folder, "rate": args.rate}
                    once(log, "shaped", job, links=links, **where)


def train_fully(args: argparse.Namespace) -> None:
    """Whole trainings on the virtual cluster, evaluations and all."""
    from tests.cluster.cluster import Cluster

    log = Log(args.log)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        with Cluster.up(args.nodes, args.rate, shared=(folder,)) as cluster:
            for job in jobs(args, shaped=True):
                once(log, "full", job, cluster=cluster, folder=folder, rate=args.rate)


def jobs(args: argparse.Namespace, *, shaped: bool) -> Iterator[Job]:
    """Seed by seed, so that a first answer is there early."""
    for seed in args.seeds:
        for lr in args.lrs or TASKS[args.task].lrs:
            for system in args.systems:
                defined = SYSTEMS[system]
                linear = defined.linear and not TASKS[args.task].batch_statistics
                ranks, per_node = args.nodes * args.per_node, args.per_node
                if not shaped:
                    ranks = 1 if linear else ranks
                    per_node = 1 if linear or defined.flat else per_node
                if shaped or not defined.steps_of:
                    yield Job(args.task, system, lr, seed, ranks, per_node, args.steps)


def once(
    log: Log,
    what: str,
    job: Job,
    *,
    cluster: Any = None,
    folder: Path | None = None,
    rate: str = "",
    **more: Any,
) -> None:
    """Run a job unless the log has it; append what it found."""
    key = key_of(what, job, rate)
    if log.find(key):
        return
    started, load = time.strftime("%Y-%m-%dT%H:%M:%S"), os.getloadavg()[0]
    found = run(job, cluster=cluster, folder=folder)
    if what != "shaped":
        many = {"step_s", "link_bytes", "stated_bytes"} & found.keys()
        found |= {name: report.median(found[name]) for name in many if found[name]}
    reached = job.of_task.target.reached_at(found["curve"])
    line = key | {"job": dataclasses.asdict(job), "reached": reached} | found | more
    log.append(line | {"started": started, "load_average": load, "machine": describe_machine()})
    last = found["curve"][-1] if found["curve"] else None
    step_ms = 1e3 * report.median(found["step_s"])
    print(
        f"{what} {job.task}: {job.system}, lr {job.lr:g}, seed {job.seed}: reached {reached}, "
        f"last {last}, {step_ms:.1f} ms a step, {found['wall_s']:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = {
        "steps": count_steps, "shaped": time_steps, "full": train_fully, "final": count_final,
        "table": None,
    }  # fmt: skip
    parser.add_argument("command", choices=list(commands))
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--task", choices=list(TASKS), default="fashion")
    parser.add_argument(
        "--systems", nargs="+", metavar="SYSTEM", choices=list(SYSTEMS), default=list(SYSTEMS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lrs", nargs="+", type=float, help="by default the task's grid")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--per-node", type=int, default=1, help="ranks on each node")
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--steps", type=int, help="at most, or in a timing")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="unshaped runs side by side")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    command = commands[args.command]
    if command is not None:
        command(args)
        return
    record = report.summarise(Log(args.log))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(report.table(record))


if __name__ == "__main__":
    main()
