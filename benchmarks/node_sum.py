"""The sum over a node's ranks in shared memory, beside an MPI all-reduce of the same buffer.

Two ranks on one host. The node sum: each rank adds its neighbour's half of the gradient to its own
half, between two fences; afterwards all ranks read all of the sum. MPI is started once per setting
(default, each of Open MPI's tuned algorithms, single copy off), the best one counts.

    python -m benchmarks.node_sum [--rounds 5] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

MEGABYTES = (0.4, 4, 40)
REPEATS = 15
TUNED = {"OMPI_MCA_coll_tuned_use_dynamic_rules": "1", "OMPI_MCA_coll": "^han,acoll"}
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "single copy off": {"OMPI_MCA_smsc": "^cma,xpmem,knem"},
    **{
        f"tuned {name}": TUNED | {"OMPI_MCA_coll_tuned_allreduce_algorithm": str(number)}
        for name, number in (
            ("recursive doubling", 3),
            ("ring", 4),
            ("segmented ring", 5),
            ("Rabenseifner", 6),
        )
    },
}


def rank_main() -> None:
    """One rank: rank 0 prints {"megabytes": [node sum, within, all-reduce]} in seconds."""
    import numpy as np
    import torch
    from mpi4py import MPI

    from hpctrain.compress.feedback import Feedback, LocalRule
    from hpctrain.compress.select import BLOCK
    from hpctrain.exchange.parties import Parties
    from hpctrain.state import shard_bounds
    from hpctrain.transport import mpi

    torch.set_num_threads(1)
    comm, world = mpi.start(), MPI.COMM_WORLD
    parties = Parties(comm, by_node=True)
    found: dict[str, list[float]] = {}
    for megabytes in MEGABYTES:
        n = int(megabytes * 250_000)
        memory = parties.memory(4 * n)
        grads = [part.view(np.float32) for part in memory.slices]
        own = slice(*shard_bounds(n, comm.rank, comm.size))
        mine = torch.from_numpy(grads[comm.rank][own])
        others = [torch.from_numpy(g[own]) for r, g in enumerate(grads) if r != comm.rank]
        block = 1 << 16
        blocks = list(zip(mine.split(block), *(o.split(block) for o in others), strict=True))
        private = np.ones(n, np.float32)

        def node_sum(memory: Any = memory, blocks: Any = blocks) -> None:
            memory.fence()
            for target, *sources in blocks:
                for source in sources:
                    target.add_(source)
            memory.fence()

        def all_reduce(private: Any = private) -> None:
            world.Allreduce(MPI.IN_PLACE, private)

        params = np.zeros(len(mine), np.float32)
        alone, together = (
            Feedback(LocalRule(), mine.numpy(), [other.numpy() for other in added], params)
            for added in ([], others)
        )

        def accumulate(feedback: Any, memory: Any = memory, fences: bool = False) -> None:
            feedback.begin(0.1, watch=False)
            for start in range(0, feedback.n, BLOCK):
                if fences and start == 0:
                    memory.fence()
                feedback.prepare(start, min(start + BLOCK, feedback.n))
            if fences:
                memory.fence()

        times = []
        for run in (
            node_sum,
            all_reduce,
            partial(accumulate, alone),
            partial(accumulate, together, fences=True),
        ):
            seconds = []
            for _ in range(REPEATS):
                grads[comm.rank][:] = 1.0
                private[:] = 1.0
                world.Barrier()
                began = time.perf_counter()
                run()
                seconds.append(world.allreduce(time.perf_counter() - began, MPI.MAX))
            times.append(statistics.median(seconds[2:]))
        grads[comm.rank][:] = 1.0
        world.Barrier()
        node_sum()
        for rank, grad in enumerate(grads):
            assert (grad[slice(*shard_bounds(n, rank, comm.size))] == comm.size).all()
        sum_s, all_reduce_s, alone_s, together_s = times
        found[str(megabytes)] = [sum_s, together_s - alone_s, all_reduce_s]
        memory.close()
    if comm.rank == 0:
        print("RESULT " + json.dumps(found), flush=True)
    world.Barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_main()
        return
    runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in SETTINGS}
    for _ in range(args.rounds):
        for name, setting in SETTINGS.items():
            command = ["tools/launch", "2", "--", sys.executable, "-m", "benchmarks.node_sum"]
            done = subprocess.run(
                [*command, "--rank"],
                check=True,
                text=True,
                capture_output=True,
                env=os.environ | setting,
            )
            line = next(row for row in done.stdout.splitlines() if row.startswith("RESULT "))
            runs[name].append(json.loads(line.removeprefix("RESULT ")))
    print(
        "| MB | node sum | best all-reduce | which | ratio | default |\n|---|---|---|---|---|---|"
    )
    for megabytes in map(str, MEGABYTES):
        ours, within = (
            statistics.median(run[megabytes][part] for found in runs.values() for run in found)
            for part in (0, 1)
        )
        theirs = {
            name: statistics.median(run[megabytes][2] for run in found)
            for name, found in runs.items()
        }
        best = min(theirs, key=lambda name: theirs[name])
        print(
            f"| {megabytes} | {1e3 * ours:.2f} ms | {1e3 * within:.2f} ms | "
            f"{1e3 * theirs[best]:.2f} ms | {best} | {theirs[best] / ours:.1f}x, "
            f"{theirs[best] / within:.1f}x | {1e3 * theirs['default']:.2f} ms |"
        )
    if args.out:
        record = {"machine": describe_machine(), "settings": SETTINGS, "seconds": runs}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
