"""Which rank lives on which node, and what each algorithm sends between them. Pure.

Ranks of a node need not be contiguous and nodes may hold different numbers of ranks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The nodes of a communicator's ranks. All methods are local and equal on every rank.

    Bytes come as (intra, inter): sent to a rank on the sender's node, and to another node.
    """

    node_of: tuple[int, ...]
    """Rank -> node number; nodes are numbered by first appearance."""
    hosts: tuple[str, ...]
    """Rank -> host name."""

    def __post_init__(self) -> None:
        if not self.node_of or len(self.node_of) != len(self.hosts):
            raise ValueError(
                f"a topology needs at least one rank and one host name for each; got "
                f"{len(self.node_of)} node numbers and {len(self.hosts)} host names"
            )
        if self.node_of != numbered(self.node_of):
            raise ValueError(
                f"nodes are numbered 0, 1, ... by first appearance; got {self.node_of}; "
                "Topology.from_labels numbers any labels"
            )

    @staticmethod
    def from_labels(labels: Sequence[Hashable], hosts: Sequence[str] | None = None) -> Topology:
        """Ranks with equal labels share a node; hosts default to node0, node1, ..."""
        node_of = numbered(labels)
        return Topology(node_of, tuple(hosts or (f"node{node}" for node in node_of)))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.node_of)

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return max(self.node_of) + 1

    def ranks_on(self, node: int) -> tuple[int, ...]:
        """The ranks of a node, ascending."""
        return tuple(rank for rank, at in enumerate(self.node_of) if at == node)

    def local_rank(self, rank: int) -> int:
        """A rank's place among the ranks of its node, from 0."""
        return self.node_of[:rank].count(self.node_of[rank])

    def same_node(self, a: int, b: int) -> bool:
        """Whether two ranks share a node."""
        return self.node_of[a] == self.node_of[b]

    def subset(self, ranks: Sequence[int]) -> Topology:
        """The topology of some ranks, which become ranks 0, 1, ... in the order given."""
        return Topology.from_labels(
            [self.node_of[rank] for rank in ranks], [self.hosts[rank] for rank in ranks]
        )

    def describe(self) -> str:
        """For people, such as "4 ranks on 2 nodes (2+2)"."""
        counts = [str(len(self.ranks_on(node))) for node in range(self.n_nodes)]
        shown = counts if len(counts) <= 8 else [*counts[:7], "..."]
        per_node = f" ({'+'.join(shown)})" if self.n_nodes > 1 else ""
        return f"{_count(self.size, 'rank')} on {_count(self.n_nodes, 'node')}{per_node}"

    def broadcast_route(self, rank: int, root: int) -> tuple[int | None, tuple[int, ...]]:
        """From whom `rank` takes a broadcast and to whom it passes each segment on.

        One rank per node (the root on its own, the first elsewhere) forms a chain over the nodes;
        inside each node a chain starts at that rank. So the buffer crosses each node's link once.

        Returns:
            (source, destinations): source is None at the root; the next node comes first.
        """
        order = sorted(
            range(self.n_nodes), key=lambda node: (node - self.node_of[root]) % self.n_nodes
        )
        heads = [root, *(self.ranks_on(node)[0] for node in order[1:])]
        place = order.index(self.node_of[rank])
        head = heads[place]
        inside = [head, *(other for other in self.ranks_on(self.node_of[rank]) if other != head)]
        at = inside.index(rank)
        destinations = []
        if rank == head and place + 1 < len(heads):
            destinations.append(heads[place + 1])
        if at + 1 < len(inside):
            destinations.append(inside[at + 1])
        if rank == root:
            return None, tuple(destinations)
        return (heads[place - 1] if rank == head else inside[at - 1]), tuple(destinations)

    def to_peer_bytes(self, rank: int, peer: int, nbytes: int) -> tuple[int, int]:
        """`nbytes` from `rank` to `peer`; nothing when they are the same rank."""
        if peer == rank:
            return 0, 0
        return (nbytes, 0) if self.same_node(rank, peer) else (0, nbytes)

    def ring_bytes(self, rank: int, nbytes: int) -> tuple[int, int]:
        """What `rank` sends in a ring all-reduce of `nbytes`: 2(P-1)/P of it, to the next rank."""
        size = self.size
        return self.to_peer_bytes(rank, (rank + 1) % size, 2 * (size - 1) * nbytes // size)

    def gather_bytes(self, rank: int, parts: Sequence[int]) -> tuple[int, int]:
        """What `rank` sends in a ring all-gather of `parts` (bytes of each rank's contribution).

        Every part passes it on its way to the next rank, except that rank's own.
        """
        successor = (rank + 1) % self.size
        return self.to_peer_bytes(rank, successor, sum(parts) - parts[successor])

    def alltoall_bytes(self, rank: int, slice_bytes: int) -> tuple[int, int]:
        """What `rank` sends in an all-to-all with equal slices: one to each other rank."""
        mates = self.node_of.count(self.node_of[rank]) - 1
        return mates * slice_bytes, (self.size - 1 - mates) * slice_bytes


def numbered(labels: Sequence[Hashable]) -> tuple[int, ...]:
    """Label -> number, by first appearance. Local."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(label, len(numbers)) for label in labels)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
