"""How much memory a data set costs a node: PSS of ranks that use it, less PSS of bare ranks.

    python -m benchmarks.data_memory --gib 2 --ranks 4 --out benchmarks/results/data_memory.json

Every rank reads every sample of the set, so that every page is in every rank's page table. A bare
rank has the same modules, the same MPI and the same kind of source, with next to no data. PSS
(proportional set size, /proc/self/smaps_rollup) divides a shared page among those that map it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine

SOURCES = ["memory-map", "shared-window"]
ROW_BYTES = 8192
BARE_BYTES = 1 << 20
BATCH = 16
LIMIT = 1.1


def config_for(source: str, nbytes: int, folder: Path) -> Any:
    from hpctrain.data import Synthetic, Text

    if source == "memory-map":
        return Text(root=str(folder), train=f"{nbytes}.txt", context=ROW_BYTES, test_fraction=0.01)
    return Synthetic(task="linear", n_train=nbytes // ROW_BYTES, n_test=1, features=ROW_BYTES // 4)


def write_text(nbytes: int, folder: Path) -> None:
    piece = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
    with (folder / f"{nbytes}.txt").open("wb") as file:
        for _ in range(nbytes >> 20):
            file.write(piece)


def pss_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this kernel has no Pss in smaps_rollup")


def measure(source: str, nbytes: int, folder: Path, report: Path) -> None:
    """Collective. One job's ranks: load, read everything, add up PSS."""
    from hpctrain.data.loader import Loader
    from hpctrain.data.order import SampleOrder
    from hpctrain.transport import mpi

    comm = mpi.start()
    began = time.perf_counter()
    data = config_for(source, nbytes, folder).load(comm.node(), 0)
    load_s = time.perf_counter() - began
    began = time.perf_counter()
    # Rank 0 of 1: this rank reads the whole order, as over many epochs every rank does.
    with Loader(data.train, SampleOrder(len(data.train), 0, 0, 1)) as loader:
        for _ in range(-(-len(data.train) // BATCH)):
            loader.next(BATCH)
        read_s = time.perf_counter() - began
        comm.barrier()
        mine = pss_bytes()
        parts = comm.allgather_bytes(str(mine).encode())
    if comm.rank == 0:
        result = {
            "data_bytes": data.nbytes,
            "pss_bytes": [int(part) for part in parts],
            "load_s": load_s,
            "read_all_s": read_s,
        }
        report.write_text(json.dumps(result))
    data.close()


def launch(source: str, nbytes: int, folder: Path, ranks: int) -> dict[str, Any]:
    report = folder / "report.json"
    worker = ["--worker", source, "--bytes", str(nbytes), "--folder", str(folder)]
    command = ["tools/launch", str(ranks), "--", sys.executable, "-m", "benchmarks.data_memory"]
    subprocess.run([*command, *worker], check=True, timeout=1200)
    result: dict[str, Any] = json.loads(report.read_text())
    report.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=SOURCES, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure(args.worker, args.bytes, args.folder, args.folder / "report.json")
        return
    nbytes = int(args.gib * 1024) << 20
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (BARE_BYTES, nbytes):
            write_text(size, Path(folder))
        for source in SOURCES:
            bare = launch(source, BARE_BYTES, Path(folder), args.ranks)
            full = launch(source, nbytes, Path(folder), args.ranks)
            grown = sum(full["pss_bytes"]) - sum(bare["pss_bytes"])
            added = full["data_bytes"] - bare["data_bytes"]
            results[source] = {"bare": bare, "full": full, "ratio": grown / added}
    record = {
        "what": "PSS of ranks that read a whole data set, less that of bare ranks, over its size",
        "machine": describe_machine(),
        "settings": {"ranks": args.ranks, "bytes": nbytes},
        "limit": LIMIT,
        "results": results,
        "within_limit": all(result["ratio"] <= LIMIT for result in results.values()),
    }
    text = json.dumps(record, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)
    sys.exit(0 if record["within_limit"] else 1)


if __name__ == "__main__":
    main()
