"""What every rule of [[sync]] sends over the links of a virtual cluster, beside its formula.

    python -m benchmarks.sync_bytes [--nodes 4] [--per-node 1] [--out FILE.json]

The kernel's counters of all nodes' links are read around two trainings that differ in their number
of meetings only, so that start, evaluation and end cancel: what remains is divided by the number of
meetings. The allowance beside the formula is 8 % for packets' headers and 64 kB for elections and
control messages. Needs root (tests/cluster) and the Fashion-MNIST files.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import describe_machine
from hpctrain.config import from_mapping
from hpctrain.data.spec import Spec
from hpctrain.models.cnn import Cnn
from hpctrain.toml_text import to_toml

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster

EVERY = 4
MEETINGS = (2, 10)
DENSITY = 0.1
"""Of qsparse, whose entries take 4 bytes as those of the vector do."""
HEADERS, CONTROL_BYTES = 1.08, 64_000
MODEL = Cnn(channels=[32, 64], hidden=1000)
NONE = {"kind": "none"}
NODES = {"kind": "dense", "dense_backend": "mpi", "scope": "node"}


@dataclass(frozen=True)
class Case:
    """A rule, and what a meeting of it sends between n nodes of r ranks."""

    rules: tuple[dict[str, Any], ...]
    vectors: Callable[[int, int], float]
    """(n, r) -> vectors that cross in one meeting, all together."""
    exchange: dict[str, Any]


def once(n: int, r: int) -> float:
    """Down a chain of nodes."""
    return n - 1


def twice(n: int, r: int) -> float:
    """Around a ring of nodes: parts to be summed, then sums."""
    return 2 * (n - 1)


def rule(kind: str, vectors: Callable[[int, int], float], **keys: Any) -> Case:
    return Case(({"kind": kind, "every": EVERY} | keys,), vectors, NONE)


CASES = {
    "leader": rule("leader", once),
    "leader in nodes, then of all": Case(
        (
            {"kind": "leader", "scope": "node", "every": 1},
            {"kind": "leader", "every": EVERY},
        ),
        once,
        NONE,
    ),
    "leader of nodes that are replicas": Case(({"kind": "leader", "every": EVERY},), once, NODES),
    "average": rule("average", twice),
    "average, SlowMo": rule("average", twice, outer={"kind": "slowmo"}),
    "average, DiLoCo": rule("average", twice, outer={"kind": "nesterov"}),
    "average, GRAWA": rule("average", twice, weights="inverse_gradient_norm"),
    "elastic": rule("elastic", twice),
    "gossip, ring": rule(
        "gossip", lambda n, r: 2 * n if n * r > 2 else 2, graph="ring", measure_every=0
    ),
    "qsparse": rule("qsparse", lambda n, r: n * (n * r - 1) * DENSITY, density=DENSITY),
    "fedaware": rule("fedaware", lambda n, r: (n - 1) * r + n * (n * r - 1) / (n * r)),
}


def sent(case: Case, meetings: int, cluster: Cluster, folder: Path, per_node: int) -> int:
    """Bytes that left all nodes during one training."""
    ranks = cluster.plan.nodes * per_node
    tree = {
        "data": {"kind": "idx", "folder": "fashion-mnist", "limit_test": 100},
        "model": MODEL.model_dump(),
        "lr": {"base": 0.02},
        "batch": {"batch_global": 4 * ranks},
        "exchange": case.exchange,
        "sync": list(case.rules),
        "train": {"steps": EVERY * meetings, "threads": 1},
        "evaluate": {"every_epochs": 0.0, "replicas": "never"},
        "checkpoint": {"at_end": False},
        "record": {"progress": "none"},
    }
    with tempfile.TemporaryDirectory(dir=folder) as name:
        config = Path(name) / "bytes.toml"
        config.write_text(to_toml(from_mapping(tree).run))
        words = [sys.executable, "-m", "hpctrain", "train", str(config), "--out", f"{name}/run"]
        before = total(cluster)
        command = cluster.mpirun(words, ranks, per_node)
        with open(Path(name) / "log", "w+") as log:
            extra = {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
            process = cluster.start(command, extra=extra, stdout=log, stderr=log)
            if process.wait():
                log.seek(0)
                raise RuntimeError(log.read()[-4000:])
        return total(cluster) - before


def total(cluster: Cluster) -> int:
    """Bytes that all nodes have sent so far."""
    return sum(out for out, _ in cluster.link_bytes().values())


def main() -> None:
    """Measure all rules, print them beside their formulas, and write the record."""
    from tests.cluster.cluster import Cluster

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--per-node", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    parameters = MODEL.build(Spec("classification", (1, 28, 28), "float32", 10)).parameters()
    vector_bytes = 4 * sum(parameter.numel() for parameter in parameters)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        with Cluster.up(args.nodes, "1gbit", shared=(folder,)) as cluster:
            for title, case in CASES.items():
                few, many = (
                    sent(case, number, cluster, folder, args.per_node) for number in MEETINGS
                )
                each = (many - few) / (MEETINGS[1] - MEETINGS[0])
                formula = case.vectors(args.nodes, args.per_node) * vector_bytes
                allowed = HEADERS * formula + CONTROL_BYTES
                found[title] = {
                    "formula_bytes": formula,
                    "link_bytes": each,
                    "allowed_bytes": allowed,
                }
                print(
                    f"{title:34} {each / 1e6:8.3f} MB a meeting, formula {formula / 1e6:8.3f}: "
                    f"{each / formula:.3f} ({'within' if each <= allowed else 'OVER'})",
                    flush=True,
                )
    if args.out:
        record = {
            "nodes": args.nodes,
            "per_node": args.per_node,
            "vector_bytes": vector_bytes,
            "every": EVERY,
            "meetings": MEETINGS,
            "rules": found,
            "machine": describe_machine(),
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
