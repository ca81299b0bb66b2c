"""What a rule moves: the parameters, and what of a replica's other memory is to go with them.

    buffers  = "mix": running statistics of normalisation layers are reconciled as parameters are;
               "own": every replica keeps its own
    momentum = "mix": the optimiser's memory likewise; "keep": every replica keeps its own;
               "reset": it becomes zero whenever the parameters have been reconciled

"mix" travels, so it costs bytes. Integer buffers (counts of steps) stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hpctrain.models.flat import FlatModel
from hpctrain.transport.communicator import Communicator

BufferPolicy = Literal["mix", "own"]
MomentumPolicy = Literal["keep", "mix", "reset"]


class Payload:
    """One flat vector of all that travels: parameters first, then buffers, then momentum.

    On the CPU with nothing beside the parameters it is the parameters' own memory; otherwise a copy
    on the host that `pack` fills and `unpack` writes back.

    Args:
        flat: The model.
        momentum_vectors: The optimiser's memory by name, each (P,).
        replica: The ranks of this replica.
        buffers, momentum: The policies above.
    """

    def __init__(
        self,
        flat: FlatModel,
        momentum_vectors: Mapping[str, Tensor],
        replica: Communicator,
        buffers: BufferPolicy = "mix",
        momentum: MomentumPolicy = "keep",
    ) -> None:
        self._replica = replica
        self.n_params = flat.n_params
        floating = [b for b in flat.buffers.values() if b.is_floating_point()]
        self._extra = [b.detach() for b in floating] if buffers == "mix" else []
        memory = list(momentum_vectors.values())
        self._extra += memory if momentum == "mix" else []
        self._reset = memory if momentum == "reset" else []
        self._buffers = self._extra[: len(floating)] if buffers == "mix" else []
        self._params_P = flat.params_P.detach()
        self.dtype = self._params_P.dtype
        self.size = self.n_params + sum(part.numel() for part in self._extra)
        """Entries of the vector."""
        self._in_place = not self._extra and self._params_P.device.type == "cpu"
        self._host = torch.empty(0, dtype=self.dtype)

    def level(self) -> None:
        """Collective over the replica. Buffers become their mean over its ranks.

        Each rank has seen other samples, so these are not equal within a replica by themselves.
        """
        if self._replica.size > 1:
            for buffer in self._buffers:
                mean = buffer.to("cpu", torch.float64)
                self._replica.allreduce(mean.numpy())
                buffer.copy_(mean / self._replica.size)

    def pack(self) -> Tensor:
        """Collective over the replica. (N,) on the host, N = `size`, equal on its ranks.

        Overwrites what an earlier call returned.
        """
        self.level()
        if self._in_place:
            return self._params_P
        if not self._host.numel():
            self._host = torch.empty(self.size, dtype=self.dtype)
        at = 0
        for part in (self._params_P, *self._extra):
            self._host[at : at + part.numel()] = part.flatten()
            at += part.numel()
        return self._host

    def unpack(self, *, met: bool = True) -> None:
        """Write the packed vector, as it has been changed, back. Local.

        Args:
            met: Reset the memory that is reset at meetings.
        """
        if not self._in_place:
            at = 0
            for part in (self._params_P, *self._extra):
                part.copy_(self._host[at : at + part.numel()].view(part.shape))
                at += part.numel()
        for memory in self._reset if met else ():
            memory.zero_()
