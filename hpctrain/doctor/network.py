"""All-reduce bandwidth inside the nodes, between them and over all ranks, in about a second.

Bus bandwidth is 2(P-1)/P x bytes / seconds for P ranks: what each rank must send and receive in any
all-reduce that wastes nothing, so figures of different P compare with one another and with a link.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from hpctrain.doctor.facts import Facts
from hpctrain.doctor.finding import Finding, Level, size_text, some, time_text
from hpctrain.transport.communicator import Communicator

SIZES_BYTES = (8, 1 << 20, 4 << 20)
_BUDGET_S = 0.1
_MOST = 50
_SLOW_CALL_S = 2e-3
_TCP_MB_S = 1250.0
_TITLES = {"node": "inside a node", "cross": "between nodes", "world": "over all nodes"}


@dataclass(frozen=True)
class Measured:
    """One all-reduce size over one group of ranks."""

    scope: str
    """Who took part: "node", "cross" (one rank per node) or "world"."""
    host: str
    """Of the group's first rank."""
    size: int
    n_bytes: int
    seconds: float
    """The median call."""
    algorithm: str
    carried: dict[str, float]
    """Network interface -> its share of the bytes that this rank sent at least."""

    @property
    def mb_per_s(self) -> float:
        """Bus bandwidth in 10^6 bytes per second."""
        return 2 * (self.size - 1) / self.size * self.n_bytes / self.seconds / 1e6


def measure(comm: Communicator) -> list[Measured]:
    """Collective. What was measured in every group, on rank 0; nothing elsewhere.

    Between nodes the first rank of each node takes part and the others wait.

    Args:
        comm: All ranks.
    """
    node, cross = comm.node(), comm.cross()
    mine: list[Measured] = []
    if node.size > 1:
        mine += _group("node", node)
    comm.barrier()
    if comm.topology.n_nodes > 1 and node.rank == 0:
        mine += _group("cross", cross)
    comm.barrier()
    if comm.size > 1 and 1 < comm.topology.n_nodes < comm.size:
        mine += _group("world", comm)
    heard = [one for one in mine if one.scope == "node" and node.rank == 0]
    heard += [one for one in mine if one.scope == "cross" and cross.rank == 0]
    heard += [one for one in mine if one.scope == "world" and comm.rank == 0]
    payloads = comm.allgather_bytes(json.dumps([vars(one) for one in heard]).encode())
    if comm.rank > 0:
        return []
    return [Measured(**one) for payload in payloads for one in json.loads(payload)]


def check(measured: Sequence[Measured], ranks: Sequence[Facts]) -> Iterator[Finding]:
    """One line per scope, of its slowest group."""
    for scope, title in _TITLES.items():
        here = [one for one in measured if one.scope == scope]
        if not here:
            continue
        slowest = {
            n: max((m for m in here if m.n_bytes == n), key=lambda m: m.seconds)
            for n in SIZES_BYTES
        }
        call, big = slowest[SIZES_BYTES[0]], slowest[SIZES_BYTES[-1]]
        groups = len({one.host for one in here})
        where = f" (slowest of {groups}: {big.host})" if scope == "node" and groups > 1 else ""
        speeds = ", ".join(
            f"{size_text(n)} {_speed(one.mb_per_s)}" for n, one in slowest.items() if n > 8
        )
        text = f"{big.size} ranks {title}{where}: {speeds}, 8 B in {time_text(call.seconds)}"
        values = {
            "scope": scope,
            "ranks": big.size,
            "host": big.host,
            "algorithm": big.algorithm,
            "bus_mb_per_s": {str(n): round(m.mb_per_s, 1) for n, m in slowest.items()},
            "seconds": {str(n): m.seconds for n, m in slowest.items()},
            "carried_by": big.carried,
        }
        level, fix = _judge(scope, call, big, ranks)
        yield Finding(f"allreduce_{scope}", level, text, fix, values)


def transport(measured: Sequence[Measured], ranks: Sequence[Facts]) -> Iterator[Finding]:
    """What carries MPI's messages, as far as it can be seen from outside."""
    first = ranks[0]
    if first.mpi is None:
        return
    big = [one for one in measured if one.n_bytes == SIZES_BYTES[-1]]
    seen = []
    for scope in ("node", "cross"):
        here = [one for one in big if one.scope == scope]
        if here:
            seen.append(f"{_TITLES[scope]} {_carrier(scope, here[0])}")
    asked = [f"{name}={value}" for name, value in first.settings.items()]
    parts = [*seen, f"set: {some(asked, 6)}" if asked else "no transport set in the environment"]
    libraries = first.mpi.transports
    if libraries:
        parts.append(f"in memory: {', '.join(libraries)}")
    values = {"settings": first.settings, "libraries": libraries, "fabric": first.fabric}
    yield Finding("transport", "ok", "; ".join(parts), values=values)
    if measured:
        yield Finding("algorithm", "ok", f"all-reduce: {' '.join(measured[0].algorithm.split())}")


def _group(scope: str, comm: Communicator) -> list[Measured]:
    """Collective over `comm`. All sizes."""
    found = []
    for n_bytes in SIZES_BYTES:
        buffer = np.zeros(n_bytes // 4, np.float32)
        comm.allreduce(buffer)  # opens the connections
        began_s = time.perf_counter()
        comm.allreduce(buffer)
        # All ranks of the group must make the same number of calls.
        longest = np.array([time.perf_counter() - began_s])
        comm.allreduce(longest, "max")
        repeats = int(min(_MOST, max(2, _BUDGET_S / max(longest[0], 1e-6))))
        before, calls_s = _sent_bytes(), []
        for _ in range(repeats):
            began_s = time.perf_counter()
            comm.allreduce(buffer)
            calls_s.append(time.perf_counter() - began_s)
        after = _sent_bytes()
        middle = np.array([median(calls_s)])
        comm.allreduce(middle, "max")
        sent = repeats * 2 * (comm.size - 1) / comm.size * buffer.nbytes
        carried = {
            name: round((after[name] - before[name]) / sent, 3)
            for name in after
            if name in before and after[name] - before[name] > 0.05 * sent
        }
        host = comm.topology.hosts[0]
        found.append(
            Measured(scope, host, comm.size, n_bytes, float(middle[0]), comm.algorithm, carried)
        )
    return found


def _judge(scope: str, call: Measured, big: Measured, ranks: Sequence[Facts]) -> tuple[Level, str]:
    """(level, fix) of one scope."""
    fabric = next((rank.fabric[0] for rank in ranks if rank.fabric), None)
    if scope == "cross" and fabric and big.mb_per_s < _TCP_MB_S:
        return "warning", (
            f"there is {fabric}, yet this is no more than TCP gives: use the site's MPI (in a "
            "container the bind model, docs/containers.md), or name its transport (UCX_TLS, "
            "FI_PROVIDER)"
        )
    if scope == "node" and call.seconds > _SLOW_CALL_S:
        return "warning", (
            "small messages wait for a core: fewer ranks per node, or with Open MPI "
            "OMPI_MCA_mpi_yield_when_idle=1"
        )
    return "ok", ""


def _carrier(scope: str, one: Measured) -> str:
    if one.carried:
        return f"over {'+'.join(sorted(one.carried))} (kernel TCP)"
    return "through shared memory" if scope == "node" else "past the kernel's network (RDMA)"


def _speed(mb_per_s: float) -> str:
    return f"{mb_per_s / 1e3:.3g} GB/s" if mb_per_s >= 1e3 else f"{mb_per_s:.3g} MB/s"


def _sent_bytes() -> dict[str, int]:
    """Bytes that every network interface of this node has sent. Local; empty if not told."""
    try:
        lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    except OSError:
        return {}
    fields = {name.strip(): rest.split() for name, _, rest in (ln.partition(":") for ln in lines)}
    return {name: int(rest[8]) for name, rest in fields.items() if len(rest) > 8}
