"""Dense sums between nodes, side by side: hpctrain, plain Horovod, MPI_Allreduce, Gloo.

On a virtual cluster of 4 nodes with 1 rank each (needs root; tests/cluster), gradients of 4 and
40 MB of float32. Each system is a job of its own, because Open MPI reads its settings when it
starts; the jobs take turns in rounds. Reported: the median over rounds of each job's median time of
one sum (the slowest rank's), beside the link's floor, 2(P-1)/P x bytes / rate.

    python -m benchmarks.allreduce [--nodes 4] [--rate 1gbit] [--rounds 5] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

MEGABYTES = (4, 40)
REPEATS = 7
GLOO_PORT = 29511

SYSTEMS = {
    "hpctrain, horovod": "exchange.dense_backend = horovod, the default bucket_mib",
    "hpctrain, mpi": "exchange.dense_backend = mpi, the default bucket_mib",
    "hpctrain, horovod, one bucket": "the whole gradient in one bucket",
    "hpctrain, mpi, one bucket": "the whole gradient in one bucket",
    "Horovod, one tensor": "hvd.allreduce of the whole gradient, Horovod's defaults",
    "Horovod, 1 MB tensors": "as a model's layers: asynchronous, fused by Horovod (128 MB)",
    "MPI_Allreduce": "mpi4py, in place, the library's defaults",
    "Gloo": "torch.distributed.all_reduce of the whole gradient",
}


def hpctrain_sum(backend: str, bucket_mib: float | None) -> Callable[[Any], None]:
    """The dense exchange's way: buckets in order, then finish."""
    import torch

    from hpctrain.exchange.buckets import make_buckets
    from hpctrain.exchange.dense import Dense
    from hpctrain.hardware import make_reducer
    from hpctrain.transport import mpi

    comm = mpi.start()
    config = Dense(dense_backend=backend)  # type: ignore[arg-type]
    mib = config.bucket_mib if bucket_mib is None else bucket_mib
    reducers: dict[int, tuple[Any, list[Any]]] = {}

    def run(gradient: torch.Tensor) -> None:
        if gradient.numel() not in reducers:
            # Layers of 1 MB, as in the peer's job.
            layers = [250_000] * (gradient.numel() // 250_000)
            names = [f"layer{number}" for number in range(len(layers))]
            buckets = make_buckets(names, layers, 4, int(mib * 2**20))
            reducer = make_reducer(
                config, [b.name for b in buckets], comm, torch.device("cpu"), 60.0
            )
            reducers[gradient.numel()] = (reducer, buckets)
        reducer, buckets = reducers[gradient.numel()]
        for bucket in buckets:
            reducer.start(bucket.index, gradient[bucket.start : bucket.stop])
        reducer.finish()

    return run


def plain_horovod_sum(pieces_of: int | None) -> Callable[[Any], None]:
    import horovod.torch as hvd

    hvd.init()

    def run(gradient: Any) -> None:
        pieces = [gradient] if pieces_of is None else gradient.split(pieces_of)
        handles = [
            hvd.allreduce_async_(piece, name=f"{gradient.numel()}.{number}", op=hvd.Sum)
            for number, piece in enumerate(pieces)
        ]
        for handle in handles:
            hvd.synchronize(handle)

    return run


def plain_mpi_sum() -> Callable[[Any], None]:
    from mpi4py import MPI

    return lambda gradient: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, gradient.numpy())


def gloo_sum(address: str) -> Callable[[Any], None]:
    import torch.distributed as dist
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    where = f"tcp://{address}:{GLOO_PORT}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    return lambda gradient: dist.all_reduce(gradient)


def rank_main(system: str, address: str) -> None:
    """One rank of one job: rank 0 prints {"4": seconds, "40": seconds}."""
    import torch

    torch.set_num_threads(1)
    makes: dict[str, Callable[[], Callable[[Any], None]]] = {
        "hpctrain, horovod": lambda: hpctrain_sum("horovod", None),
        "hpctrain, mpi": lambda: hpctrain_sum("mpi", None),
        "hpctrain, horovod, one bucket": lambda: hpctrain_sum("horovod", 1024),
        "hpctrain, mpi, one bucket": lambda: hpctrain_sum("mpi", 1024),
        "Horovod, one tensor": lambda: plain_horovod_sum(None),
        "Horovod, 1 MB tensors": lambda: plain_horovod_sum(250_000),
        "MPI_Allreduce": plain_mpi_sum,
        "Gloo": lambda: gloo_sum(address),
    }
    run = makes[system]()
    from mpi4py import MPI  # hpctrain has to start MPI first, with its settings

    comm = MPI.COMM_WORLD
    found = {}
    for megabytes in MEGABYTES:
        gradient = torch.zeros(megabytes * 250_000)
        seconds = []
        for repeat in range(REPEATS + 2):
            gradient.fill_(comm.rank + 1.0)
            comm.Barrier()
            start = time.perf_counter()
            run(gradient)
            seconds.append(time.perf_counter() - start)
            expected = comm.size * (comm.size + 1) / 2
            if repeat == 0 and not bool((gradient == expected).all()):
                raise RuntimeError(f"{system}: wrong sum")
        slowest = [max(times) for times in zip(*comm.allgather(seconds[2:]), strict=True)]
        found[str(megabytes)] = statistics.median(slowest)
    if comm.rank == 0:
        print("RESULT " + json.dumps(found), flush=True)
    comm.Barrier()


def measure(nodes: int, rate: str, rounds: int) -> dict[str, Any]:
    from tests.cluster.cluster import Cluster

    times: dict[str, dict[str, list[float]]] = {
        system: {str(size): [] for size in MEGABYTES} for system in SYSTEMS
    }
    with Cluster.up(nodes, rate) as cluster:
        links = [str(link) for link in cluster.links]
        bits_per_s = cluster.plan.bits_per_s
        assert bits_per_s, "a floor needs a rate"
        floors = {
            str(size): 8e6 * size * 2 * (nodes - 1) / nodes / bits_per_s for size in MEGABYTES
        }
        crossed: dict[str, float] = {}
        for turn in range(rounds):
            for system in list(SYSTEMS)[:: 1 if turn % 2 == 0 else -1]:
                before = sum(sent for sent, _ in cluster.link_bytes().values())
                command = [sys.executable, "-m", "benchmarks.allreduce", "--rank", system]
                output = cluster.run(
                    [*command, cluster.plan.address("node1")],
                    ranks=nodes,
                    per_node=1,
                    extra={"GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": "."},
                )
                line = next(row for row in output.splitlines() if row.startswith("RESULT "))
                for size, seconds in json.loads(line.removeprefix("RESULT ")).items():
                    times[system][size].append(seconds)
                after = sum(sent for sent, _ in cluster.link_bytes().values())
                sums = (REPEATS + 2) * sum(MEGABYTES) * 1e6
                crossed[system] = (after - before) / nodes / sums
                print(f"round {turn + 1}: {system}: {line}", file=sys.stderr, flush=True)
    return {
        "nodes": nodes, "rate": rate, "rounds": rounds, "repeats": REPEATS, "links": links,
        "machine": describe_machine(), "systems": SYSTEMS, "floor_s": floors, "seconds": times,
        "link_bytes_per_gradient_byte": crossed,
        "median_s": {
            system: {size: statistics.median(found) for size, found in by_size.items()}
            for system, by_size in times.items()
        },
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    sizes = list(record["floor_s"])
    rows = [
        "| | " + " | ".join(f"{size} MB" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    floor = " | ".join(f"{1e3 * record['floor_s'][size]:.0f} ms" for size in sizes)
    rows.append(f"| the link's floor | {floor} |")
    for system, median in record["median_s"].items():
        cells = [
            f"{1e3 * median[size]:.0f} ms, {median[size] / record['floor_s'][size]:.2f}x"
            for size in sizes
        ]
        rows.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank_main(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record = measure(args.nodes, args.rate, args.rounds)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
