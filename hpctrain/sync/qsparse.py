"""Qsparse-local-SGD: replicas train on their own and exchange the largest entries of what they did.

    every `every` steps:  acc_i = m_i + (centre - x_i);  sent_i = the largest entries of acc_i,
                          rounded as they travel;  m_i <- acc_i - sent_i
                          centre <- centre - mean of sent_i;  x_i <- centre

A replica's memory m_i holds what it did and has not sent: it is not lost but comes later, and the
mean of all m_i plus the centre is where plain averaging would be. density = 1 in float32 is local
SGD with periodic averaging. Per meeting and rank: one all-gather of density * P entries (4 bytes
each in float16). Memory: three vectors. With one replica nothing happens.

What else travels (buffers; momentum that is mixed) is averaged whole.

Source: Basu et al. 2019, arXiv 1906.02367, algorithm 1 with Q the rounding to `value` and Comp_k
the top k. Difference: k is counted over the whole vector (over each rank's part of it in a replica
of several ranks), not layer by layer.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hpctrain.compress.select import NOTHING, Selector
from hpctrain.compress.wire import Coding, Header, Slot
from hpctrain.errors import ConfigError, NonFinite
from hpctrain.state import Placed, State
from hpctrain.sync.rule import Ground, Moment, PeriodicRule
from hpctrain.sync.table import RuleTable


class Qsparse(RuleTable):
    """[[sync]] kind = "qsparse"."""

    kind: Literal["qsparse"] = "qsparse"
    """The largest entries of every replica's movement."""
    density: float = Field(default=0.02, gt=0.0, le=1.0)
    """Fraction of the entries that a replica sends at a meeting."""
    value: Literal["float32", "float16", "bfloat16"] = "float16"
    """Number format of the entries on the network."""

    def build(self, ground: Ground) -> QsparseRule:
        """Collective. The running rule.

        Raises:
            ConfigError: the model is not float32.
        """
        return QsparseRule(self, ground)


class QsparseRule(PeriodicRule):
    """Runs `Qsparse`."""

    def __init__(self, config: Qsparse, ground: Ground) -> None:
        super().__init__(config)
        self._ground = ground
        params_P = ground.payload.pack()[: ground.payload.n_params]
        if params_P.dtype != torch.float32:
            raise ConfigError(
                f'[[sync]] kind = "qsparse" sends float32 movements and the model is '
                f'{params_P.dtype}; set train.dtype = "float32"'
            )
        self._centre_P = params_P.clone()
        self._memory_P = torch.zeros_like(params_P)
        self._part = slice(*ground.members.part.indices(ground.payload.n_params)[:2])
        n = max(self._part.stop - self._part.start, 0)
        self._count = math.ceil(config.density * n)
        self._coding = Coding("block16", config.value)
        self._selector = Selector(max(n, 1))
        self._meetings = 0
        self._spread = True
        """Whether all ranks of the replica hold the whole memory."""

    def meet(self, at: Moment, vector_N: Tensor) -> None:
        """As `Rule.meet`. Tells the norm of the memory, sqrt(mean of |m_i|^2)."""
        members, n_params = self._ground.members, self._ground.payload.n_params
        if members.size == 1:
            self.held(at, {})
            return
        square = np.zeros(1)
        if members.across is not None:
            square[0] = self._exchange(vector_N)
        members.sum_pieces(square)
        if not math.isfinite(square[0]):
            raise NonFinite("the parameters of a replica are inf or NaN")
        members.spread(self._centre_P.numpy())
        vector_N[:n_params] = self._centre_P
        if vector_N.numel() > n_params:
            members.mean(vector_N[n_params:].numpy())
        self._spread = members.inside.size == 1
        self._meetings += 1
        self.held(at, {"memory_norm": math.sqrt(square[0] / members.size)})

    def settle(self) -> None:
        """Collective over the replica. Bring the parts of its memory together."""
        if not self._spread:
            self._ground.members.spread(self._memory_P.numpy())
            self._spread = True

    def state(self) -> State:
        """The centre, and each replica's own memory. Local, after `settle`."""
        tensors = {"centre": Placed(self._centre_P), "memory": Placed(self._memory_P)}
        return State(tensors, self._trigger.counters() | {"meetings": self._meetings})

    def load_state(self, state: State) -> None:
        """Local. With other replicas all take the old ones' mean memory, so the mean stays."""
        self._centre_P.copy_(state.tensors["centre"].tensor)
        self._memory_P.copy_(state.tensors["memory"].tensor)
        self._trigger.load_counters(state.counters)
        self._meetings = int(state.counters["meetings"] or 0)

    def _exchange(self, vector_N: Tensor) -> float:
        """Collective over the ranks at this place. Move this rank's part of the centre.

        Returns:
            |memory|² of the part; inf where some replica's movement is not finite.
        """
        members, part = self._ground.members, self._part
        self._memory_P[part] += self._centre_P[part] - vector_N[part]
        centre_K, memory_K = self._centre_P[part].numpy(), self._memory_P[part].numpy()
        n, coding = len(memory_K), self._coding
        message = np.zeros(coding.slot_bytes(n, self._count), np.uint8)
        slot = Slot(message, n, self._count, coding)
        picked = self._selector.pick(memory_K, self._count)
        entries = picked if picked.finite else NOTHING
        memory_K[entries.indices_K] -= slot.write(self._meetings, 0, entries, Header(picked.finite))
        for row in members.gather_rows(message):
            header, indices, values = Slot(row, n, self._count, coding).read(self._meetings, 0)
            if not header.finite:
                return math.inf
            centre_K[indices] -= values / np.float32(members.size)
        return float(torch.linalg.vector_norm(self._memory_P[part], dtype=torch.float64)) ** 2
