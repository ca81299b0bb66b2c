"""`hpctrain topology`: the levels of this launch, gathered and drawn once."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.doctor.run import start, tell
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.launcher import launch_from_environment
from hpctrain.transport.levels import Address, Levels, find_switches
from hpctrain.transport.numa import own_domain
from hpctrain.transport.topology import Topology


@dataclass(frozen=True)
class Survey:
    """The levels of one launch, and its groups."""

    levels: Levels
    groups: tuple[int, ...]
    """Rank -> group number."""

    def to_json(self) -> str:
        """Local. Nodes with their ranks, switches and NUMA domains; groups with their ranks."""
        topology, above = self.levels.topology, self.levels.switches.above
        nodes = []
        for node in range(topology.n_nodes):
            ranks = topology.ranks_on(node)
            nodes.append(
                {
                    "host": topology.hosts[ranks[0]],
                    "ranks": list(ranks),
                    "switches": None if above is None else list(above[ranks[0]]),
                    "numa": [self.levels.domains[rank] for rank in ranks],
                }
            )
        groups: list[list[int]] = [[] for _ in set(self.groups)]
        for rank, group in enumerate(self.groups):
            groups[group].append(rank)
        content: dict[str, Any] = {
            "format": 1,
            "ranks": topology.size,
            "nodes": nodes,
            "switches_unknown": self.levels.switches.reason if above is None else None,
            "groups": groups,
        }
        return json.dumps(content, indent=1)


def survey(comm: Communicator, environment: Mapping[str, str], rule: str) -> Survey:
    """Collective. The same on all ranks.

    Args:
        comm: All ranks.
        environment: This rank's.
        rule: What makes a group, see `Levels.groups`.

    Raises:
        UsageError: the rule does not fit; on all ranks.
    """
    levels = Levels.of(comm, environment)
    return Survey(levels, levels.groups(rule))


def alone() -> Levels:
    """Local. Of one process without a launcher."""
    topology = Topology.from_labels([0], [socket.gethostname()])
    mine = Address.of(topology.hosts[0], os.environ)
    return Levels(topology, find_switches([mine], topology), (own_domain(),))


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
    if launch.family == "none":
        levels = alone()
        return show(Survey(levels, levels.groups(rule)))
    started = start(launch)
    with started.guard.guarded():
        found = survey(started.comm, os.environ, rule)
        return tell(started.comm, found if started.comm.rank == 0 else None, show)
