"""The levels around the nodes: switches, NUMA domains and groups, as findings and as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.tree import Tree

from hpctrain.doctor.facts import Facts
from hpctrain.doctor.finding import Finding, fold, name_ranks, some
from hpctrain.transport.levels import Address, Levels, Switches, find_switches
from hpctrain.transport.topology import Topology

_SHOWN_NODES = 32
_AT_THE_ENDS = 4


def switches_of(ranks: Sequence[Facts], topology: Topology) -> Switches:
    """Local. The switch level, proved rank by rank."""
    return find_switches([Address.of(rank.host, rank.topology) for rank in ranks], topology)


def check(ranks: Sequence[Facts], topology: Topology) -> Iterator[Finding]:
    """Which switches the nodes hang on, or why that is unknown (only SLURM tells); the groups."""
    if topology.size > 1:
        text = f"{topology.n_nodes}, one per node (hpctrain topology draws them, and others)"
        yield Finding("groups", "ok", text, values={"of_rank": list(topology.node_of)})
    allocation = ranks[0].allocation
    slurm = allocation is not None and allocation.scheduler == "SLURM"
    if topology.n_nodes == 1 or not (slurm or any(rank.topology for rank in ranks)):
        return
    found = switches_of(ranks, topology)
    if found.above is None:
        yield Finding("switches", "note", f"unknown: {found.reason}", values={"above": None})
    elif found.reason:
        yield Finding("switches", "note", found.reason, values={"above": []})
    else:
        leaves = list(dict.fromkeys(found.above))
        text = f"{len(leaves)} next to the nodes: {some(['.'.join(leaf) for leaf in leaves], 8)}"
        yield Finding("switches", "ok", text, values={"above": [list(a) for a in found.above]})


def draw(levels: Levels, groups: Sequence[int], *, full: bool = False) -> Tree:
    """Local. Switches, nodes, their NUMA domains where ranks are bound to several, ranks, groups.

    Args:
        levels: Of the ranks.
        groups: Rank -> group number.
        full: Draw every node, however many there are.
    """
    topology, switches = levels.topology, levels.switches
    tree = Tree(f"{topology.describe()}, {_count(len(set(groups)), 'group')}")
    places: dict[tuple[str, ...], Tree] = {(): tree}
    hanging: dict[tuple[str, ...], list[int]] = {}
    for node in range(topology.n_nodes):
        above = switches.above[topology.ranks_on(node)[0]] if switches.above else ()
        hanging.setdefault(above, []).append(node)
    for above, nodes in hanging.items():
        for depth in range(1, len(above) + 1):
            path = above[:depth]
            if path not in places:
                below = [n for at, held in hanging.items() if at[:depth] == path for n in held]
                label = f"switch {path[-1]}  {_count(len(below), 'node')}"
                places[path] = places[path[:-1]].add(label)
        _hang(places[above], nodes, levels, groups, full)
    return tree


def remarks(topology: Topology, switches: Switches) -> list[str]:
    """Local. What the drawing does not show."""
    said = []
    if topology.size == 1:
        said.append("One process; under the launcher all ranks are drawn: mpirun -n 4 ...")
    elif switches.above is None and topology.n_nodes > 1:
        said.append(f"Switches unknown: {switches.reason}.")
    return said


def _hang(
    tree: Tree, nodes: Sequence[int], levels: Levels, groups: Sequence[int], full: bool
) -> None:
    topology = levels.topology
    shown = list(nodes)
    left_out = 0
    if not full and len(nodes) > _SHOWN_NODES:
        left_out = len(nodes) - 2 * _AT_THE_ENDS
        shown = [*nodes[:_AT_THE_ENDS], *nodes[-_AT_THE_ENDS:]]
    hosts = {node: topology.hosts[topology.ranks_on(node)[0]] for node in shown}
    width = max(len(host) for host in hosts.values())
    labels = {node: name_ranks(topology.ranks_on(node)) for node in shown}
    ranks_width = max(len(label) for label in labels.values())
    for place, node in enumerate(shown):
        if left_out and place == _AT_THE_ENDS:
            inside = nodes[_AT_THE_ENDS:-_AT_THE_ENDS]
            ranks = sorted(rank for hidden in inside for rank in topology.ranks_on(hidden))
            tree.add(f"... {left_out} more nodes, {name_ranks(ranks)} (--full draws them)")
        in_groups = _groups_text(topology.ranks_on(node), groups)
        branch = tree.add(f"{hosts[node]:<{width}}  {labels[node]:<{ranks_width}}  {in_groups}")
        for domain, ranks in _domains_of(node, levels).items():
            branch.add(f"numa {domain}  {name_ranks(ranks)}  {_groups_text(ranks, groups)}")


def _domains_of(node: int, levels: Levels) -> dict[int, list[int]]:
    """Local. NUMA domain -> its ranks; empty where not all are bound, or all to the same one."""
    found: dict[int, list[int]] = {}
    for rank in levels.topology.ranks_on(node):
        domain = levels.domains[rank]
        if domain is None:
            return {}
        found.setdefault(domain, []).append(rank)
    return found if len(found) > 1 else {}


def _groups_text(ranks: Sequence[int], groups: Sequence[int]) -> str:
    """Local. "group 0", or which of a node's ranks are in which."""
    by_group: dict[int, list[int]] = {}
    for rank in ranks:
        by_group.setdefault(groups[rank], []).append(rank)
    if len(by_group) == 1:
        return f"group {groups[ranks[0]]}"
    return "; ".join(f"{fold(members)} in group {number}" for number, members in by_group.items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
