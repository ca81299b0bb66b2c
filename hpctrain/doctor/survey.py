"""`hpctrain topology`: the levels of this launch, gathered and drawn once."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpctrain.doctor.run import start, tell
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.launcher import launch_from_environment
from hpctrain.transport.levels import Address, Switches, find_switches, group_ranks
from hpctrain.transport.topology import Topology


@dataclass(frozen=True)
class Survey:
    """Nodes, switches and groups of one launch."""

    topology: Topology
    switches: Switches
    groups: tuple[int, ...]
    """Rank -> group number."""

    def to_json(self) -> str:
        """Local. Nodes with their ranks and switches, groups with their ranks."""
        topology, above = self.topology, self.switches.above
        nodes = []
        for node in range(topology.n_nodes):
            ranks = topology.ranks_on(node)
            switches = None if above is None else list(above[ranks[0]])
            host = topology.hosts[ranks[0]]
            nodes.append({"host": host, "ranks": list(ranks), "switches": switches})
        groups: list[list[int]] = [[] for _ in set(self.groups)]
        for rank, group in enumerate(self.groups):
            groups[group].append(rank)
        content: dict[str, Any] = {
            "format": 1,
            "ranks": topology.size,
            "nodes": nodes,
            "switches_unknown": self.switches.reason if above is None else None,
            "groups": groups,
        }
        return json.dumps(content, indent=1)


def survey(comm: Communicator, mine: Address, rule: str) -> Survey:
    """Collective. The same on all ranks.

    Args:
        comm: All ranks.
        mine: This rank's address.
        rule: What makes a group, see `group_ranks`.

    Raises:
        UsageError: the rule does not fit; on all ranks.
    """
    payloads = comm.allgather_bytes(json.dumps(asdict(mine)).encode())
    return surveyed([Address(**json.loads(text)) for text in payloads], comm.topology, rule)


def surveyed(addresses: Sequence[Address], topology: Topology, rule: str) -> Survey:
    """Local. From all ranks' addresses.

    Raises:
        UsageError: the rule does not fit.
    """
    switches = find_switches(addresses, topology)
    return Survey(topology, switches, group_ranks(rule, topology, switches))


def run(rule: str, show: Callable[[Survey], int]) -> int:
    """Collective. Survey this launch and show it on one rank; the exit code.

    Args:
        rule: What makes a group.
        show: Prints it and returns the exit code; called on one rank.

    Raises:
        UsageError: the rule does not fit.
        BackendError: MPI could not be started.
    """
    launch = launch_from_environment()
    mine = Address.of(socket.gethostname(), os.environ)
    if launch.family == "none":
        return show(surveyed([mine], Topology.from_labels([0], [mine.host]), rule))
    started = start(launch)
    with started.guard.guarded():
        found = survey(started.comm, mine, rule)
        return tell(started.comm, found if started.comm.rank == 0 else None, show)
