"""`exchange = "auto"` against dense, step by step in interleaved blocks of one job.

Two ranks: on one host, and on two nodes of a virtual cluster (needs root) at two rates. Every rank
holds one model per exchange and fills its gradient from a pool; a step is arm, finish, settle and
the update, in blocks of 50 steps, the order of the exchanges turned round from block to block.
Reported: the ratio of block times auto / the faster of Horovod and MPI, its mean over blocks
(paired, on a logarithmic scale) and the upper 95 % bound of that (Student's t).

    python -m benchmarks.never_slower [--blocks 20] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

SIZES = (100_000, 1_000_000, 10_000_000)
RATES = (None, "1gbit", "100mbit")
LAYER = 250_000
EXCHANGES: dict[str, dict[str, Any]] = {
    "auto": {"kind": "auto"},
    "dense, horovod": {"kind": "dense", "dense_backend": "horovod"},
    "dense, mpi": {"kind": "dense", "dense_backend": "mpi"},
}
STUDENT_95 = {19: 1.729, 29: 1.699, 39: 1.685}
"""One-sided quantiles of Student's t by degrees of freedom."""


def rank_main(n: int, blocks: int, steps: int) -> None:
    """One rank: rank 0 prints the seconds of every block of every exchange."""
    import torch
    from pydantic import TypeAdapter
    from torch import nn

    from hpctrain.exchange import ExchangeConfig
    from hpctrain.exchange.setting import Setting
    from hpctrain.hardware import make_reducer
    from hpctrain.models.flat import FlatModel
    from hpctrain.optimiser import AppliedUpdate, Sgd
    from hpctrain.transport import mpi

    torch.set_num_threads(1)
    comm = mpi.start()
    rule = Sgd(momentum=0.9)

    def reducers(table: Any, names: Any) -> Any:
        return make_reducer(table, names, comm, torch.device("cpu"), 60.0)

    runs = {}
    for name, table in EXCHANGES.items():
        config = TypeAdapter(ExchangeConfig).validate_python(table)
        layers = max(1, n // LAYER)
        module = nn.ParameterList(
            [nn.Parameter(torch.zeros(100, n // layers // 100)) for _ in range(layers)]
        )
        flat = FlatModel(module, config.comes_last)
        exchange = config.build(Setting(flat, comm, reducers, rule))
        applied = exchange.gives == "update"
        runs[name] = flat, exchange, AppliedUpdate() if applied else rule.build(flat)
    pool = torch.randn(n + 97 * 16, generator=torch.Generator().manual_seed(comm.rank))

    def block(name: str) -> float:
        flat, exchange, optimiser = runs[name]
        comm.barrier()
        began = time.perf_counter()
        for step in range(steps):
            start = 97 * (step % 16)
            flat.grads_P.copy_(pool[start : start + n])
            exchange.arm(0.01)
            exchange.finish()
            exchange.settle(keep=True)
            optimiser.step(0.01)
        comm.barrier()
        return time.perf_counter() - began

    for name in runs:
        block(name)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(blocks):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(block(name))
    tally = runs["auto"][1].tally()
    if comm.rank == 0:
        print("RESULT " + json.dumps({"seconds": found, "tally": tally}), flush=True)
    for _, exchange, _ in runs.values():
        exchange.close()
    comm.barrier()


def compare(found: dict[str, list[float]]) -> dict[str, Any]:
    """Mean of the paired ratios and its upper 95 % bound."""
    dense = min(
        (name for name in found if name != "auto"), key=lambda x: statistics.median(found[x])
    )
    logs = [math.log(a / b) for a, b in zip(found["auto"], found[dense], strict=True)]
    spread = statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.fmean(logs)
    quantile = STUDENT_95.get(len(logs) - 1, 1.73)
    return {
        "against": dense,
        "ratio": math.exp(mean),
        "upper_95": math.exp(mean + quantile * spread),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    from tests.cluster.cluster import Cluster

    results = []
    for rate in args.rates:
        for n in args.sizes:
            # A dense step of 40 MB takes 3 s at 100 Mbit/s: fewer of them there.
            steps = 50 if rate != "100mbit" or n < 10_000_000 else args.long_steps
            words = ["-m", "benchmarks.never_slower", "--rank", str(n)]
            words += ["--blocks", str(args.blocks), "--steps", str(steps)]
            if rate is None:
                output = subprocess.run(
                    ["tools/launch", "2", "--", sys.executable, *words],
                    check=True, capture_output=True, text=True,
                ).stdout  # fmt: skip
            else:
                with Cluster.up(2, rate) as cluster:
                    output = cluster.run(
                        [sys.executable, *words], ranks=2, per_node=1,
                        extra={"PYTHONPATH": "."}, timeout_s=7200,
                    )  # fmt: skip
            line = next(row for row in output.splitlines() if row.startswith("RESULT "))
            found = json.loads(line.removeprefix("RESULT "))
            entry = {"rate": rate or "one host", "n": n, "blocks": args.blocks, "steps": steps}
            results.append(entry | compare(found["seconds"]) | found)
            print(row_of(results[-1]), flush=True)
    return results


def row_of(entry: dict[str, Any]) -> str:
    step_ms = {
        name: 1e3 * statistics.median(seconds) / entry["steps"]
        for name, seconds in entry["seconds"].items()
    }
    retry = entry["tally"].get("retry_share")
    return (
        f"| {entry['rate']} | {entry['n']:,} | "
        + " | ".join(f"{step_ms[name]:.2f} ms" for name in EXCHANGES)
        + f" | {entry['ratio']:.3f} | {entry['upper_95']:.3f} | "
        + (f"{retry:.2%} |" if retry is not None else "none |")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--long-steps", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument(
        "--rates", nargs="+", type=lambda x: None if x == "host" else x, default=RATES
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_main(args.rank, args.blocks, args.steps)
        return
    results = measure(args)
    if args.out:
        record = {"machine": describe_machine(), "exchanges": EXCHANGES, "results": results}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
