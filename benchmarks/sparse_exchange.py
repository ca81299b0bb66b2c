"""One exchange of a gradient, from accumulating to the applied update, sparse beside dense.

On a virtual cluster (needs root; tests/cluster). Each system is a job of its own; the jobs take
turns in rounds. Reported per system: the median over rounds of each job's median time of one step
(the slowest rank's), and the bytes on a node's link.

    python -m benchmarks.sparse_exchange [--rate 1gbit] [--rounds 5] [--n 1e7] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

REPEATS = 9
WARM = 2
LAYER = (500, 500)

DENSE: dict[str, dict[str, Any]] = {
    "dense, horovod": {"kind": "dense", "dense_backend": "horovod"},
    "dense, mpi": {"kind": "dense", "dense_backend": "mpi"},
}


def sparse(algorithm: str, **settings: Any) -> dict[str, Any]:
    return {"kind": "topk", "algorithm": algorithm, "density": 0.01} | settings


SYSTEMS: dict[str, dict[str, Any]] = DENSE | {
    "gather": sparse("gather"),
    "owner": sparse("owner"),
    "exclusive": sparse("exclusive"),
    "exclusive, pairs of 8 bytes": sparse("exclusive", index="uint32", values="float32"),
}


def rank_main(system: str, n: int) -> None:
    """One rank of one job: rank 0 prints its times and link bytes."""
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
    config = TypeAdapter(ExchangeConfig).validate_python(SYSTEMS[system])
    layers = max(1, n // (LAYER[0] * LAYER[1]))
    shape = LAYER if n >= LAYER[0] * LAYER[1] else (1, n)
    module = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for _ in range(layers)])
    flat = FlatModel(module, config.comes_last)

    def reducers(table: Any, names: Any) -> Any:
        return make_reducer(table, names, comm, torch.device("cpu"), 60.0)

    exchange = config.build(Setting(flat, comm, reducers, Sgd()))
    optimiser = AppliedUpdate() if exchange.gives == "update" else Sgd().build(flat)
    generator = torch.Generator().manual_seed(comm.rank)
    pool = torch.randn(flat.n_params + 999, generator=generator)
    pool *= torch.randn(flat.n_params + 999, generator=generator).exp()
    seconds, crossed = [], []
    for step in range(WARM + REPEATS):
        flat.grads_P.copy_(pool[step * 97 : step * 97 + flat.n_params])
        comm.barrier()
        before = link_bytes()
        start = time.perf_counter()
        exchange.arm(0.1)
        exchange.finish()
        exchange.settle(keep=True)
        optimiser.step(0.1)
        seconds.append(time.perf_counter() - start)
        comm.barrier()
        crossed.append(link_bytes() - before)
    found = comm.allgather_bytes(json.dumps([seconds[WARM:], crossed[WARM:]]).encode())
    if comm.rank == 0:
        times, sent = zip(*(json.loads(part) for part in found), strict=True)
        result = {
            "seconds": statistics.median(max(step) for step in zip(*times, strict=True)),
            "link_bytes": statistics.median(max(step) for step in zip(*sent, strict=True)),
            "formula": exchange.tally().get("bytes_formula"),
            "n": flat.n_params,
        }
        print("RESULT " + json.dumps(result), flush=True)
    exchange.close()
    comm.barrier()


def link_bytes() -> int:
    """Bytes sent so far by this node's link; 0 outside a virtual node."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from tests.cluster.cluster import Cluster

    systems = [name for name in SYSTEMS if not args.only or name in args.only]
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    with Cluster.up(args.nodes, args.rate) as cluster:
        links = [str(link) for link in cluster.links]
        for turn in range(args.rounds):
            for system in systems[:: 1 if turn % 2 == 0 else -1]:
                command = [sys.executable, "-m", "benchmarks.sparse_exchange", "--rank", system]
                output = cluster.run(
                    [*command, "--n", str(args.n)],
                    ranks=args.nodes * args.per_node,
                    per_node=args.per_node,
                    extra={"PYTHONPATH": "."},
                )
                line = next(row for row in output.splitlines() if row.startswith("RESULT "))
                found[system].append(json.loads(line.removeprefix("RESULT ")))
                print(f"round {turn + 1}: {system}: {line}", file=sys.stderr, flush=True)
    return {
        "nodes": args.nodes, "per_node": args.per_node, "rate": args.rate, "rounds": args.rounds,
        "repeats": REPEATS, "n": args.n, "links": links, "machine": describe_machine(),
        "systems": {name: SYSTEMS[name] for name in systems},
        "runs": found,
        "median_s": {
            name: statistics.median(run["seconds"] for run in runs)
            for name, runs in found.items()
        },
        "link_bytes": {
            name: statistics.median(run["link_bytes"] for run in runs)
            for name, runs in found.items()
        },
        "formula_bytes": {name: runs[0]["formula"] for name, runs in found.items()},
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    dense = min(record["median_s"][name] for name in DENSE if name in record["median_s"])
    rows = ["| | ms | against dense | bytes per node | of the formula |", "|---|---|---|---|---|"]
    for name, seconds in record["median_s"].items():
        sent, formula = record["link_bytes"][name], record["formula_bytes"][name]
        share = f"{sent / formula:.3f}" if formula else ""
        rows.append(
            f"| {name} | {1e3 * seconds:.1f} | {dense / seconds:.1f}x | {sent:,.0f} | {share} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--per-node", type=int, default=1)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n", type=lambda text: int(float(text)), default=10_000_000)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_main(args.rank, args.n)
        return
    record = measure(args)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
