"""The list of checks over the facts of all ranks. Local; rank 0 runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hpctrain.doctor import allocation, containers, levels, nodes, software
from hpctrain.doctor.facts import Facts
from hpctrain.doctor.finding import Finding, name_ranks
from hpctrain.transport.topology import Topology

CHECKS: tuple[Callable[[Sequence[Facts], Topology], Iterable[Finding]], ...] = (
    lambda ranks, topology: software.launcher(ranks),
    lambda ranks, topology: software.mpi(ranks),
    lambda ranks, topology: software.thread_level(ranks),
    lambda ranks, topology: software.torch(ranks),
    lambda ranks, topology: software.horovod(ranks),
    lambda ranks, topology: software.versions(ranks),
    nodes.node_map,
    levels.check,
    nodes.cores,
    nodes.gpus,
    lambda ranks, topology: nodes.limits(ranks),
    lambda ranks, topology: nodes.temporary(ranks),
    lambda ranks, topology: nodes.shared_memory(ranks),
    lambda ranks, topology: containers.container(ranks),
    containers.namespaces,
    lambda ranks, topology: containers.user_packages(ranks),
    lambda ranks, topology: allocation.check(ranks),
    lambda ranks, topology: unknown(ranks),
)


def judge(ranks: Sequence[Facts], topology: Topology) -> list[Finding]:
    """Every check's findings, in the order of the report. Local.

    Args:
        ranks: The facts of all ranks, in rank order.
        topology: Of the same ranks.
    """
    return [finding for check in CHECKS for finding in check(ranks, topology)]


def unknown(ranks: Sequence[Facts]) -> Iterable[Finding]:
    """Facts that could not be found out."""
    seen: dict[tuple[str, str], list[int]] = {}
    for rank in ranks:
        for fact, why in rank.unknown.items():
            seen.setdefault((fact, why), []).append(rank.rank)
    for (fact, why), holders in seen.items():
        text = f"{fact} is unknown ({name_ranks(holders)}): {why}"
        yield Finding("unknown", "note", text, values={"fact": fact, "ranks": holders})
