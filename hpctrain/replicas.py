"""Which ranks hold equal parameters, and which of them belong together at every scope.

A replica is the ranks over which an exchange sums gradients at every step: all ranks, those of a
node, a group or a switch (`exchange.scope`), or a single rank (exchange.kind = "none").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hpctrain.errors import ConfigError
from hpctrain.state import State
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.topology import Topology


@dataclass(frozen=True)
class Replicas:
    """The replicas, and this rank's own."""

    of_rank: tuple[int, ...]
    """Rank -> replica number, by first appearance."""
    inside: Communicator
    """The ranks of this rank's replica."""
    rank: int
    """This rank, of all."""

    @classmethod
    def make(cls, comm: Communicator, of_rank: Sequence[int]) -> Replicas:
        """Collective. From rank -> replica number."""
        inside = comm.split(of_rank[comm.rank], comm.rank)
        assert inside is not None
        return cls(tuple(of_rank), inside, comm.rank)

    @property
    def count(self) -> int:
        """How many there are."""
        return max(self.of_rank) + 1

    @property
    def mine(self) -> int:
        """The number of this rank's."""
        return self.of_rank[self.rank]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of this rank's replica, ascending; the first writes its checkpoints."""
        return tuple(r for r, number in enumerate(self.of_rank) if number == self.mine)

    def each_its_own(self, state: State) -> State:
        """Local. A state whose replicated tensors are equal within a replica only.

        With other replicas than those that wrote it, every new one starts at the old ones' mean,
        and what waits in an exchange keeps its sum over all parties, as a mean over replicas.
        """
        if self.count == 1:
            return state
        owner = self.ranks[0]
        tensors = {}
        for name, placed in state.tensors.items():
            if placed.placement == "replicated" and placed.tensor.dtype.is_floating_point:
                placed = replace(placed, placement="replica", resize="mean", owner=owner)
            elif placed.pieces is not None:  # each replica has parties of its own
                pieces = replace(
                    placed.pieces,
                    party=self.mine * placed.pieces.parties + placed.pieces.party,
                    parties=self.count * placed.pieces.parties,
                )
                placed = replace(placed, pieces=pieces)
            tensors[name] = placed
        return State(tensors, state.counters)


def require_nested(of_rank: Sequence[int], group_of: Sequence[int], scope: str) -> None:
    """Local. Refuse groups that cut a replica, or that hold one each.

    Raises:
        ConfigError: names the ranks and what to do.
    """
    groups: dict[int, int] = {}
    for rank, replica in enumerate(of_rank):
        if groups.setdefault(replica, group_of[rank]) != group_of[rank]:
            first = of_rank.index(replica)
            raise ConfigError(
                f'a [[sync]] rule with scope = "{scope}" would cut a replica: ranks {first} and '
                f"{rank} hold equal parameters and are in different groups. Use a wider scope, or "
                "a narrower exchange.scope"
            )


Scopes = Callable[[str], tuple[int, ...]]
"""Scope -> (rank -> group number)."""


def cross_groups(topology: Topology, of_rank: Sequence[int]) -> tuple[int, ...]:
    """Local. Rank -> its replica's place among those of its node: the scope "cross"."""
    places: list[int] = []
    for rank, replica in enumerate(of_rank):
        node = topology.node_of[rank]
        on_node = list(dict.fromkeys(of_rank[r] for r in topology.ranks_on(node)))
        places.append(on_node.index(replica))
    return tuple(places)
