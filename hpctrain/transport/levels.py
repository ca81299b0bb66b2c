"""The levels of a machine: switches from SLURM, nodes, NUMA domains; and groups of ranks.

SLURM_TOPOLOGY_ADDR names the switches above a node and the node itself ("root.leaf2.node12"), and
SLURM_TOPOLOGY_ADDR_PATTERN says which is which ("switch.switch.node"). Ranks that mpirun started
may have inherited the values of the first node, so an address counts only where it is proved: its
last part is this rank's own node, the ranks of a node agree, and no two nodes share an address.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from hpctrain.errors import UsageError
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.numa import numa_ranks, own_domain
from hpctrain.transport.topology import Topology, numbered

_ADDRESS, _PATTERN, _NODE = "SLURM_TOPOLOGY_ADDR", "SLURM_TOPOLOGY_ADDR_PATTERN", "SLURMD_NODENAME"


@dataclass(frozen=True)
class Address:
    """What one rank knows of its place in the network."""

    host: str
    """This rank's host name."""
    node: str = ""
    """SLURMD_NODENAME."""
    address: str = ""
    """SLURM_TOPOLOGY_ADDR."""
    pattern: str = ""
    """SLURM_TOPOLOGY_ADDR_PATTERN."""

    @staticmethod
    def of(host: str, environment: Mapping[str, str]) -> Address:
        """Local. From this rank's own environment."""
        return Address(
            host,
            environment.get(_NODE, ""),
            environment.get(_ADDRESS, ""),
            environment.get(_PATTERN, ""),
        )

    def parts(self) -> tuple[tuple[str, ...], str]:
        """Local. (switches from the top down, node name); a node name may contain dots.

        Raises:
            ValueError: the two variables do not describe a path that ends at this rank's node.
        """
        if not self.address or not self.pattern:
            raise ValueError(f"{_PATTERN if self.address else _ADDRESS} is not set")
        kinds = self.pattern.split(".")
        names = self.address.split(".", len(kinds) - 1)
        if kinds[-1] != "node" or len(names) != len(kinds):
            raise ValueError(f'{_ADDRESS}="{self.address}" does not fit "{self.pattern}"')
        own = {self.node, self.node.partition(".")[0], self.host, self.host.partition(".")[0]}
        if names[-1] not in own - {""}:
            raise ValueError(
                f'{_ADDRESS}="{self.address}" names another node than {self.host}: inherited from '
                "the node where the launcher was started"
            )
        return tuple(names[:-1]), names[-1]


@dataclass(frozen=True)
class Switches:
    """The switches above every rank."""

    above: tuple[tuple[str, ...], ...] | None
    """Rank -> names from the top switch down, () without switches; None: unknown."""
    reason: str
    """Why they are unknown or absent, "" where there are some."""


def find_switches(addresses: Sequence[Address], topology: Topology) -> Switches:
    """Local. The switch level, where every rank's address is proved.

    Args:
        addresses: In rank order.
        topology: Of the same ranks.
    """
    if not any(address.address for address in addresses):
        return Switches(None, f"{_ADDRESS} is not set (no SLURM step, or an old SLURM)")
    found: list[tuple[str, ...]] = []
    nodes: dict[str, int] = {}
    for rank, address in enumerate(addresses):
        try:
            switches, name = address.parts()
        except ValueError as error:
            return Switches(None, f"rank {rank} on {address.host}: {error}")
        first = topology.ranks_on(topology.node_of[rank])[0]
        if first < rank and found[first] != switches:
            return Switches(None, f"ranks {first} and {rank} share a node and name other switches")
        if nodes.setdefault(name, topology.node_of[rank]) != topology.node_of[rank]:
            return Switches(
                None,
                f'ranks on several nodes have the address of node "{name}": inherited from the '
                "node where the launcher was started",
            )
        found.append(switches)
    reason = "" if any(found) else "SLURM names no switch (no topology plugin is configured)"
    return Switches(tuple(found), reason)


def check_groups(groups: Sequence[Sequence[int]], size: int) -> tuple[int, ...]:
    """Local. Rank -> group number, of groups that a person wrote down.

    Raises:
        UsageError: a group names a rank that does not exist, or a rank is in two or in none.
    """
    found: dict[int, int] = {}
    for number, ranks in enumerate(groups):
        for rank in ranks:
            if not 0 <= rank < size:
                raise UsageError(
                    f"group {number} names rank {rank}; this run has ranks 0 to {size - 1}"
                )
            if rank in found:
                raise UsageError(
                    f"rank {rank} is in group {found[rank]} and in group {number}; groups must not "
                    "overlap"
                )
            found[rank] = number
    missing = [rank for rank in range(size) if rank not in found]
    if missing:
        raise UsageError(
            f"no group has rank(s) {', '.join(map(str, missing))}; every rank needs one"
        )
    return tuple(found[rank] for rank in range(size))


@dataclass(frozen=True)
class Levels:
    """Switches above the nodes, nodes, and NUMA domains below them, of the same ranks."""

    topology: Topology
    switches: Switches
    domains: tuple[int | None, ...]
    """Rank -> the NUMA domain of its node that it is bound to; None: not bound to one."""

    @staticmethod
    def of(comm: Communicator, environment: Mapping[str, str]) -> Levels:
        """Collective. From what every rank's environment and kernel say; equal on all ranks."""
        topology = comm.topology
        address = Address.of(topology.hosts[comm.rank], environment)
        mine = {"address": asdict(address), "domain": own_domain()}
        said = [json.loads(text) for text in comm.allgather_bytes(json.dumps(mine).encode())]
        switches = find_switches([Address(**rank["address"]) for rank in said], topology)
        return Levels(topology, switches, tuple(rank["domain"] for rank in said))

    def groups(self, rule: str) -> tuple[int, ...]:
        """Local. Rank -> group number, numbered by first appearance.

        Args:
            rule: "node", "numa", "switch" (the one next to the node), "world", "size:N" or
                "nodes:N": N consecutive ranks or nodes each, the last group takes the rest.

        Raises:
            UsageError: no such rule, or the level is unknown.
        """
        topology = self.topology
        if rule == "node":
            return topology.node_of
        if rule == "world":
            return (0,) * topology.size
        if rule == "numa":
            return numa_ranks(self.domains, topology)
        if rule == "switch":
            above = self.switches.above
            if above is None or not all(above):
                why = self.switches.reason or "not every node has a switch"
                raise UsageError(f'groups by "switch": {why}; use node, nodes:N, world or size:N')
            return numbered(above)
        word, _, number = rule.partition(":")
        of_rank = {"size": range(topology.size), "nodes": topology.node_of}.get(word)
        if of_rank is not None and number.isdigit() and int(number) > 0:
            return tuple(place // int(number) for place in of_rank)
        raise UsageError(
            f'groups by "{rule}": choose node, numa, switch, world, size:N (N ranks each) or '
            "nodes:N (N nodes each)"
        )
