"""The replicas that one rule reconciles, and how vectors cross between them.

A replica is the ranks that hold equal parameters: a single rank, or the ranks that an exchange with
a scope keeps equal. Place p of every replica carries part p of a vector to place p of the others,
so a vector leaves a replica once however many ranks it has; inside, the parts are put together
again. Where several replicas share a node, `NodeSum` sends one copy of a sum over the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpctrain.state import shard_bounds
from hpctrain.sync.node_sum import NodeSum
from hpctrain.sync.relay import Relay
from hpctrain.transport.communicator import Communicator, Mailbox
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
        part: What of a vector this rank carries; nothing without a place.
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
        self.part = self._parts[place] if place is not None else slice(0, 0)
        self._node_sum: NodeSum | None = None
        if self.across is not None and self.across.topology.n_nodes < self.across.size:
            longest = self._parts[0].stop - self._parts[0].start
            self._node_sum = NodeSum(self.across, longest * 8)

    def sum(self, vector_N: np.ndarray) -> None:
        """Collective over the group. In place: the sum over replicas, equal on all ranks.

        Args:
            vector_N: (n,) float32 or float64, equal on the ranks of a replica.
        """
        if self.size == 1:
            return
        if self.across is not None:
            (self._node_sum or self.across.allreduce)(vector_N[self.part])
        self.spread(vector_N)

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
            self.across.broadcast(vector_N[self.part], root)
        if self.rank != root:
            self.spread(vector_N)

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
            part, across = self.part, self.across
            under_way = [
                across.irecv(received[part], source)
                for received, source in zip(arrived, sources, strict=True)
            ]
            under_way += [across.isend(vector_N[part], dest) for dest in dests]
            for handle in under_way:
                handle.wait()
        for received in arrived:
            self.spread(received)
        return arrived

    def exchange_pieces(self, vector_N: np.ndarray) -> np.ndarray:
        """Collective over the group. (size, K): row i is this rank's piece of replica i's vector.

        A part is cut in `size` equal pieces, zeros behind its end. A rank without a place gets no
        columns.
        """
        if self.across is None:
            return np.empty((self.size, 0), vector_N.dtype)
        part_K = vector_N[self.part]
        piece = -(-part_K.size // self.size)
        padded = np.zeros(piece * self.size, vector_N.dtype)
        padded[: part_K.size] = part_K
        rows = np.empty_like(padded)
        self.across.ialltoall(padded, rows).wait()
        return rows.reshape(self.size, piece)

    def join_pieces(self, piece_K: np.ndarray, vector_N: np.ndarray) -> None:
        """Collective over the group. `vector_N` becomes what all ranks' pieces make up."""
        if self.across is not None:
            joined = self.gather_rows(piece_K).ravel()
            part_K = vector_N[self.part]
            part_K[:] = joined[: part_K.size]
        self.spread(vector_N)

    def gather_rows(self, row_K: np.ndarray) -> np.ndarray:
        """Collective over the ranks at this place. (size, K): every replica's row.

        Rows go round a ring, so that between nodes each crosses a link once; a non-blocking
        all-gather of Open MPI's would send it to every rank of the other node.
        """
        assert self.across is not None
        rows_MK = np.empty((self.size, row_K.size), row_K.dtype)
        rows_MK[self.rank] = row_K
        for turn in range(self.size - 1):
            leaving, arriving = ((self.rank - turn - late) % self.size for late in (0, 1))
            handle = self.across.irecv(rows_MK[arriving], (self.rank - 1) % self.size)
            self.across.isend(rows_MK[leaving], (self.rank + 1) % self.size).wait()
            handle.wait()
        return rows_MK

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
        if self._node_sum is not None:
            self._node_sum.close()

    def spread(self, vector_N: np.ndarray) -> None:
        """Collective over the replica. In place: every place's part comes to all of its ranks."""
        if self.inside.size > 1:
            for place, part in enumerate(self._parts):
                self.inside.broadcast(vector_N[part], place)
