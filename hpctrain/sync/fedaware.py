"""FedAWARE: a round moves along the direction that all replicas' movements have in common.

    delta_i = x_start - x_i;   m_i <- (1 - alpha) m_i + alpha delta_i;   u_i = m_i / |m_i|
    w = the weights for which |sum of w_i u_i| is least;   d = sum of w_i u_i
    direction:   x <- x_start - lr * s * d,  s = mean of |delta_i| (length = "mean") or 1 ("unit")
    projection:  x <- x_start - lr * (<v, d> / <d, d>) d,  v = mean of delta_i

Replicas of every length of movement have the same say; the point of least norm has the same inner
product with all u_i of positive weight, so none of them is moved uphill. Left out is a replica
whose m_i is zero, because with a zero among the u_i d would be zero: one whose rank has no samples
(data.partition = "dirichlet"), and with alpha = 1 one that had none left for this round.

Per meeting and rank: an all-to-all, an all-gather (2 (M - 1) / M of the vector together) and M^2
numbers; projection one all-reduce more. Memory: two vectors, and M pieces of 1 / M during a
meeting.

Source: Zeng et al. 2023, "Tackling Hybrid Heterogeneity on Federated Optimization via Gradient
Diversity Maximization", arXiv 2310.02702, and the authors' code. length = "unit" is theirs: all u_i
have length 1, so a round's length does not depend on how far replicas moved; "mean" restores that.
Buffers and momentum that are mixed are averaged. With one replica nothing happens.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hpctrain.errors import NonFinite
from hpctrain.state import Placed, State
from hpctrain.sync.minnorm import min_norm_weights
from hpctrain.sync.rule import Ground, Moment, PeriodicRule
from hpctrain.sync.table import RuleTable


class FedAware(RuleTable):
    """[[sync]] kind = "fedaware"."""

    kind: Literal["fedaware"] = "fedaware"
    """The common direction of all replicas."""
    alpha: float = Field(default=0.5, gt=0.0, le=1.0)
    """How much of a replica's last movement its remembered direction takes."""
    lr: float = Field(default=1.0, gt=0.0)
    """Length of a round's step."""
    form: Literal["direction", "projection"] = "direction"
    """Move along d, or by the average's component along d."""
    length: Literal["mean", "unit"] = "mean"
    """What d is multiplied by, in the form "direction"."""

    def build(self, ground: Ground) -> FedAwareRule:
        """Collective. The running rule."""
        return FedAwareRule(self, ground)


class FedAwareRule(PeriodicRule):
    """Runs `FedAware`."""

    def __init__(self, config: FedAware, ground: Ground) -> None:
        super().__init__(config)
        self._config = config
        self._ground = ground
        params_P = ground.payload.pack()[: ground.payload.n_params]
        self._start_P = params_P.clone()
        self._moved_P = torch.zeros_like(params_P)

    def meet(self, at: Moment, vector_N: Tensor) -> None:
        """As `Rule.meet`. Tells |d|: 0 if the movements cancel, 1 if they agree."""
        members, n_params = self._ground.members, self._ground.payload.n_params
        if members.size == 1:
            self.held(at, {})
            return
        delta_P = self._start_P - vector_N[:n_params]
        self._moved_P.lerp_(delta_P, self._config.alpha)
        norm = float(torch.linalg.vector_norm(self._moved_P))
        lengths_M = members.gather([float(torch.linalg.vector_norm(delta_P)), norm])
        if not np.isfinite(lengths_M).all():
            raise NonFinite("the parameters of a replica are inf or NaN")
        unit_P = self._moved_P / norm if norm else self._moved_P.clone()
        rows_MK = members.exchange_pieces(unit_P.numpy())
        wide = rows_MK.astype(np.float64)
        gram_MM = wide @ wide.T
        members.sum_pieces(gram_MM)
        moved = lengths_M[:, 1] > 0.0
        weights_M = np.zeros(members.size)
        if moved.any():
            weights_M[moved] = min_norm_weights(gram_MM[np.ix_(moved, moved)])
        members.join_pieces((weights_M @ wide).astype(rows_MK.dtype), unit_P.numpy())
        square = float(weights_M @ gram_MM @ weights_M)
        if self._config.form == "projection":
            members.mean(delta_P.numpy())
            scale = float(delta_P @ unit_P) / square if square else 0.0
        else:
            scale = lengths_M[:, 0].mean() if self._config.length == "mean" else 1.0
        if vector_N.numel() > n_params:
            members.mean(vector_N[n_params:].numpy())
        self._start_P.sub_(unit_P, alpha=self._config.lr * scale)
        vector_N[:n_params] = self._start_P
        common = {"direction_norm": math.sqrt(max(square, 0.0))}
        self.held(at, common | {"largest_weight": float(weights_M.max())})

    def state(self) -> State:
        """The round's start, and each replica's own remembered direction. Local."""
        return State(
            {
                "start": Placed(self._start_P),
                "moved": Placed(self._moved_P),
            },
            self._trigger.counters(),
        )

    def load_state(self, state: State) -> None:
        """Local. At another number of ranks all remember the old ones' mean direction."""
        self._start_P.copy_(state.tensors["start"].tensor)
        self._moved_P.copy_(state.tensors["moved"].tensor)
        self._trigger.load_counters(state.counters)
