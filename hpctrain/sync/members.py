"""The replicas that one rule reconciles, and how vectors cross between them.

A replica is the ranks that hold equal parameters: a single rank, or the ranks that an exchange with
a scope keeps equal. Place p of every replica carries part p of a vector to place p of the others,
so a vector leaves a replica once however many ranks it has; inside, the parts are put together
again. Where several replicas share a node, sums are taken in its shared memory first and one copy
crosses the network, cut among the node's ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpctrain.state import shard_bounds
from hpctrain.sync.relay import Relay
from hpctrain.transport.communicator import Communicator, Mailbox, SharedWindow
from hpctrain.transport.topology import numbered


class Members:
    """One rank's view of the replicas of its group. Collective over `comm` to make.

    Args:
        comm: All ranks, of whatever group.
        replica_of: Rank -> replica number.
        group_of: Rank -> group number; the ranks of a replica are in one group.
        n: Entries of the vectors that will travel.

    Attributes:
        rank: This rank's replica, numbered inside the group.
        size: Replicas in the group.
        inside: The ranks of this replica.
        across: The ranks at this rank's place in the group's replicas; None on a rank without a
            place, where its replica has more ranks than the smallest of the group.
    """

    def __init__(
        self, comm: Communicator, replica_of: Sequence[int], group_of: Sequence[int], n: int
    ) -> None:
        me = comm.rank
        mine = [rank for rank in range(comm.size) if group_of[rank] == group_of[me]]
        replicas = numbered([replica_of[rank] for rank in mine])
        self.rank = replicas[mine.index(me)]
        self.size = max(replicas) + 1
        places = min(replicas.count(number) for number in range(self.size))
        inside = comm.split(replica_of[me], me)
        assert inside is not None
        self.inside = inside
        place = inside.rank if inside.rank < places else None
        color = None if place is None else group_of[me] * comm.size + place
        self.across = comm.split(color, me)
        self._parts = [slice(*shard_bounds(n, p, places)) for p in range(places)]
        self._part = self._parts[place] if place is not None else slice(0, 0)
        self._window: SharedWindow | None = None
        if self.across is not None and self.across.topology.n_nodes < self.across.size:
            longest = self._parts[0].stop - self._parts[0].start
            self._window = self.across.node().window(longest * 8)
            if self.across.topology.n_nodes > 1:
                self.across.cross()

    def sum(self, vector_N: np.ndarray) -> None:
        """Collective over the group. In place: the sum over replicas, equal on all ranks.

        Args:
            vector_N: (n,) float32 or float64, equal on the ranks of a replica.
        """
        if self.size == 1:
            return
        if self.across is not None:
            self._sum_part(self.across, vector_N[self._part])
        self._spread(vector_N)

    def mean(self, vector_N: np.ndarray) -> None:
        """Collective over the group. In place: the mean over replicas, equal on all ranks."""
        if self.size > 1:
            self.sum(vector_N)
            vector_N /= self.size

    def broadcast(self, vector_N: np.ndarray, root: int) -> None:
        """Collective over the group. In place: replica `root`'s vector; crosses each link once."""
        if self.size == 1:
            return
        if self.across is not None:
            self.across.broadcast(vector_N[self._part], root)
        if self.rank != root:
            self._spread(vector_N)

    def gather(self, numbers: Sequence[float]) -> np.ndarray:
        """Collective over the group. (size, len(numbers)) float64: what every replica said.

        `numbers` are equal on the ranks of a replica.
        """
        said = b""
        if self.across is not None:
            own = np.asarray(numbers, np.float64).tobytes()
            said = b"".join(self.across.allgather_bytes(own))
        if len(self._parts) < self.inside.size:
            said = self.inside.broadcast_bytes(said if self.inside.rank == 0 else None, 0)
        return np.frombuffer(said, np.float64).reshape(self.size, len(numbers))

    def receive(
        self, vector_N: np.ndarray, dests: Sequence[int], sources: Sequence[int]
    ) -> list[np.ndarray]:
        """Collective over the group. Send the vector to some replicas, take those of others.

        Every rank passes lists that fit those of the others.

        Returns:
            The vectors of `sources`, in that order, each (n,).
        """
        arrived = [np.empty_like(vector_N) for _ in sources]
        if self.across is not None:
            part, across = self._part, self.across
            under_way = [
                across.irecv(received[part], source)
                for received, source in zip(arrived, sources, strict=True)
            ]
            under_way += [across.isend(vector_N[part], dest) for dest in dests]
            for handle in under_way:
                handle.wait()
        for received in arrived:
            self._spread(received)
        return arrived

    def exchange_pieces(self, vector_N: np.ndarray) -> np.ndarray:
        """Collective over the group. (size, K): row i is this rank's piece of replica i's vector.

        A part is cut in `size` equal pieces, zeros behind its end. A rank without a place gets no
        columns.
        """
        if self.across is None:
            return np.empty((self.size, 0), vector_N.dtype)
        part_K = vector_N[self._part]
        piece = -(-part_K.size // self.size)
        padded = np.zeros(piece * self.size, vector_N.dtype)
        padded[: part_K.size] = part_K
        rows = np.empty_like(padded)
        self.across.ialltoall(padded, rows).wait()
        return rows.reshape(self.size, piece)

    def join_pieces(self, piece_K: np.ndarray, vector_N: np.ndarray) -> None:
        """Collective over the group. `vector_N` becomes what all ranks' pieces make up."""
        if self.across is not None:
            joined = np.empty(piece_K.size * self.size, vector_N.dtype)
            self.across.iallgather(piece_K, joined).wait()
            part_K = vector_N[self._part]
            part_K[:] = joined[: part_K.size]
        self._spread(vector_N)

    def sum_pieces(self, numbers: np.ndarray) -> None:
        """Collective over the group. In place: sums, over all pieces, of numbers of each piece."""
        if self.across is not None:
            self.across.allreduce(numbers)
        else:
            numbers[...] = 0.0
        if self.inside.size > 1:
            self.inside.allreduce(numbers)

    def mailbox(self) -> Mailbox:
        """Collective over the group. Messages between replicas; `poll` is collective over each."""
        box = None
        if self.inside.rank == 0:
            assert self.across is not None
            box = self.across.mailbox()
        return Relay(box, self.inside)

    def close(self) -> None:
        """Collective over the group. Free the shared memory."""
        if self._window is not None:
            self._window.close()

    def _spread(self, vector_N: np.ndarray) -> None:
        """Collective over the replica. Every place's part to all of its ranks."""
        if self.inside.size > 1:
            for place, part in enumerate(self._parts):
                self.inside.broadcast(vector_N[part], place)

    def _sum_part(self, across: Communicator, part_K: np.ndarray) -> None:
        if self._window is None:
            across.allreduce(part_K)
            return
        node, topology = across.node(), across.topology
        seats = min(len(topology.ranks_on(number)) for number in range(topology.n_nodes))
        boards = [piece[: part_K.nbytes].view(part_K.dtype) for piece in self._window.slices]
        boards[node.rank][:] = part_K
        self._window.fence()
        if node.rank < seats:
            mine = slice(*shard_bounds(part_K.size, node.rank, seats))
            total = boards[0][mine].copy()
            for board in boards[1:]:
                total += board[mine]
            if topology.n_nodes > 1:
                across.cross().allreduce(total)
            boards[0][mine] = total
        self._window.fence()
        part_K[:] = boards[0]
        self._window.fence()
