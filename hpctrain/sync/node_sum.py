"""Sums over replicas that share nodes: in the node's memory first, one copy crosses the network."""

from __future__ import annotations

import numpy as np

from hpctrain.state import shard_bounds
from hpctrain.transport.communicator import Communicator


class NodeSum:
    """Sums vectors over ranks of which some share a node. Collective to make.

    Args:
        across: The ranks.
        nbytes: Of the longest vector.
    """

    def __init__(self, across: Communicator, nbytes: int) -> None:
        self._across = across
        self._window = across.node().window(nbytes)
        if across.topology.n_nodes > 1:
            across.cross()

    def __call__(self, part_K: np.ndarray) -> None:
        """Collective. In place: the sum, equal on all ranks; each node's ranks carry a share."""
        across, window = self._across, self._window
        node, topology = across.node(), across.topology
        seats = min(len(topology.ranks_on(number)) for number in range(topology.n_nodes))
        boards = [piece[: part_K.nbytes].view(part_K.dtype) for piece in window.slices]
        boards[node.rank][:] = part_K
        window.fence()
        if node.rank < seats:
            mine = slice(*shard_bounds(part_K.size, node.rank, seats))
            total = boards[0][mine].copy()
            for board in boards[1:]:
                total += board[mine]
            if topology.n_nodes > 1:
                across.cross().allreduce(total)
            boards[0][mine] = total
        window.fence()
        part_K[:] = boards[0]
        window.fence()

    def close(self) -> None:
        """Collective. Free the shared memory."""
        self._window.close()
