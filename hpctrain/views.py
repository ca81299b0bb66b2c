"""The model as evaluations see it: the average of all replicas, or each replica's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpctrain.models.flat import FlatModel
from hpctrain.replicas import Replicas
from hpctrain.sync.members import Members
from hpctrain.sync.payload import Payload
from hpctrain.transport.communicator import Communicator


class Views:
    """Puts parameters and buffers in place for a while. Collective to make.

    Args:
        flat: The model.
        replicas: Which ranks hold equal parameters.
        comm: All ranks.
    """

    def __init__(self, flat: FlatModel, replicas: Replicas, comm: Communicator) -> None:
        self._flat, self._replicas = flat, replicas
        self._whole = Payload(flat, {}, replicas.inside)
        self._all = Members(comm, replicas.of_rank, (0,) * comm.size, self._whole.size)

    @contextmanager
    def average(self) -> Iterator[None]:
        """Collective. Evaluation mode, at the average of all replicas inside the block.

        Float buffers, which differ from rank to rank, are averaged over all ranks.
        """
        with self.own():
            if self._replicas.count == 1:
                yield
                return
            vector_N = self._whole.pack()
            own_P = self._flat.params_P.clone()
            self._all.mean(vector_N.numpy())
            self._whole.unpack()
            try:
                yield
            finally:
                self._flat.params_P.copy_(own_P)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Collective. Evaluation mode, at this replica's parameters inside the block.

        Float buffers are averaged over its ranks; all buffers come back after the block.
        """
        buffers = {name: buffer.clone() for name, buffer in self._flat.buffers.items()}
        self._whole.level()
        self._flat.module.eval()
        try:
            yield
        finally:
            self._flat.module.train()
            for name, buffer in self._flat.buffers.items():
                buffer.copy_(buffers[name])

    def spread(self, results: dict[str, float], leader: int | None) -> dict[str, float]:
        """Collective. Least, mean and most of every replica's results, and the leader's."""
        said_MK = self._all.gather(list(results.values()))
        found: dict[str, float] = {}
        for name, values_M in zip(results, said_MK.T, strict=True):
            found |= {
                f"replica_{name}_min": float(values_M.min()),
                f"replica_{name}_mean": float(values_M.mean()),
                f"replica_{name}_max": float(values_M.max()),
            }
            if leader is not None:
                found[f"leader_{name}"] = float(values_M[leader])
        return found
