"""Who compresses: nodes (their ranks add up in shared memory first), or single ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpctrain.transport.communicator import Communicator, Ledger, SharedWindow

PHASES = 4
"""Communicators of an exchange, one for each of at most three phases (see `lane`), and the last one
for sums."""


@dataclass(frozen=True)
class Agreed:
    """What the messages of one bucket said, equal on all parties."""

    finite: bool = True
    residual_sq: float = 0.0
    """Sum over parties of the squares of their residuals."""
    wanted: float = 0.0
    """Mean over parties of the number of entries they would like to send."""


class Parties:
    """The parties, and this rank's place in its own. Collective to make.

    The vector of a party is cut in as many shards as the smallest party has ranks. Place p of a
    party works on shard p, with the ranks at place p of the other parties; with uneven nodes some
    ranks have no place and only read.

    Args:
        comm: All ranks; splits of it are used, with a ledger of their own.
        by_node: Whether nodes are the parties; else every rank is one.
    """

    def __init__(self, comm: Communicator, *, by_node: bool) -> None:
        own = _split(comm, 0)
        self.everyone = _split(own, 0)
        """All ranks, for agreements outside the lane."""
        # The lane's thread counts by itself: a ledger is not made for two threads at a time.
        self.ledger = own.ledger = Ledger()
        topology = comm.topology
        if by_node:
            inside, across = own.node(), own.cross()
            sizes = [len(topology.ranks_on(node)) for node in range(topology.n_nodes)]
            self.count, self.places = topology.n_nodes, min(sizes)
            self.mine = topology.node_of[comm.rank]
        else:
            inside, across = _split(own, comm.rank), own
            self.count, self.places = comm.size, 1
            self.mine = comm.rank
        self.inside = inside
        self.place = inside.rank if inside.rank < self.places else None
        self.across = across
        self.phases = [_split(across, 0) for _ in range(PHASES)]

    def count_into(self, ledger: Ledger, seconds: float) -> None:
        """Add what was sent since the last call, and seconds of waiting, to `ledger`. Local."""
        sent = self.ledger
        ledger.add(
            intra=sent.bytes_sent_intra,
            inter=sent.bytes_sent_inter,
            seconds=seconds,
            source=sent.source,
        )
        sent.bytes_sent_intra = sent.bytes_sent_inter = 0

    def memory(self, nbytes: int) -> PartyMemory:
        """Collective. Memory of `nbytes` per rank that all ranks of the party see."""
        return PartyMemory(self.inside, nbytes)


class PartyMemory:
    """One slice of bytes per rank of a party; plain memory where the party is one rank."""

    def __init__(self, inside: Communicator, nbytes: int) -> None:
        self._window: SharedWindow | None = None
        if inside.size == 1:
            self.slices = [np.zeros(nbytes, np.uint8)]
        else:
            self._window = inside.window(nbytes)
            self.slices = list(self._window.slices)
            self.slices[inside.rank][:] = 0
            self.fence()

    def fence(self) -> None:
        """Collective over the party. Stores made before it are seen by all its ranks after it."""
        if self._window:
            self._window.fence()

    def close(self) -> None:
        """Collective over the party. The slices must not be used afterwards."""
        self.slices = []
        if self._window:
            self._window.close()


def _split(comm: Communicator, color: int) -> Communicator:
    part = comm.split(color, comm.rank)
    assert part is not None
    return part
