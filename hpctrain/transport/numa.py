"""The level below the node: which NUMA domain (memory of one socket, mostly) a rank is bound to.

MPI's own hardware-guided split is not asked: Open MPI 4 refuses it, Open MPI 5 and MPICH know other
names, and the standard promises none. Linux tells the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hpctrain.errors import UsageError
from hpctrain.transport.topology import Topology, numbered

_DOMAINS = Path("/sys/devices/system/node")


def own_domain(cores: set[int] | None = None, domains: Path = _DOMAINS) -> int | None:
    """Local. The domain that holds all cores this process may use; None if it is not in one.

    Args:
        cores: Core numbers; by default those of this process.
        domains: A folder nodeN per domain, each with a file `cpulist` such as "0-3,8".
    """
    cores = set(os.sched_getaffinity(0)) if cores is None else cores
    for folder in sorted(domains.glob("node[0-9]*")):
        if cores <= _cores((folder / "cpulist").read_text()):
            return int(folder.name.removeprefix("node"))
    return None


def numa_ranks(domains: Sequence[int | None], topology: Topology) -> tuple[int, ...]:
    """Local. Rank -> group number: a group per node and domain.

    Args:
        domains: `own_domain` of every rank.
        topology: Of the same ranks.

    Raises:
        UsageError: a rank is not bound to one domain.
    """
    free = [rank for rank, domain in enumerate(domains) if domain is None]
    if free:
        raise UsageError(
            f'groups by "numa": every rank must be bound to one NUMA domain; rank {free[0]} on '
            f"{topology.hosts[free[0]]} is not. Start with mpirun --map-by numa --bind-to core, or "
            'use "node"'
        )
    return numbered(list(zip(topology.node_of, domains, strict=True)))


def _cores(text: str) -> set[int]:
    cores: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
    return cores
