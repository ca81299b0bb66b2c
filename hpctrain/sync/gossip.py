"""Decentralised SGD: every replica mixes with its neighbours; nobody ever averages all.

    every `every` steps:  x_i <- sum over j of W[i, j] x_j
    order = "before": on the parameters where the gradient was taken, so that a step is
                      x_i(t+1) = sum_j W[i, j] x_j(t) - lr * g_i(x_i(t))     (adapt while combine)
    order = "after":  on what the update left                                (adapt then combine)

W is doubly stochastic, so the mean of all replicas moves as under exact averaging. Per meeting a
replica sends its vector to each neighbour (graphs: `mixing`); memory: a vector per neighbour.

Source: Lian et al. 2017, arXiv 1705.09056, algorithm 1; Zhu et al. 2023, arXiv 2306.02913, equation
1, show that the order "before" minimises the loss averaged over perturbations with the replicas'
own covariance (`regularise.sam` has that form).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from hpctrain.errors import ConfigError, NonFinite
from hpctrain.state import State
from hpctrain.sync.mixing import Graph, check_mixing, mixing_matrix
from hpctrain.sync.rule import Ground, Moment, PeriodicRule, Phase
from hpctrain.sync.table import RuleTable


class Gossip(RuleTable):
    """[[sync]] kind = "gossip"."""

    kind: Literal["gossip"] = "gossip"
    """Neighbours mix."""
    every: int = Field(default=1, ge=1)
    """Steps between two meetings."""
    graph: Graph = "one_peer"
    """Who the neighbours are."""
    matrix: list[list[float]] | None = None
    """A mixing matrix of your own instead of `graph`: a row per replica."""
    order: Literal["before", "after"] = "before"
    """Mix the parameters before or after the update."""
    measure_every: int = Field(default=50, ge=0)
    """Meetings between two measurements of the consensus distance, which take an all-reduce; 0 =
    never. The record shows the last one."""

    @field_validator("matrix")
    @classmethod
    def _doubly_stochastic(cls, matrix: list[list[float]] | None) -> list[list[float]] | None:
        if matrix is not None:
            if len({len(row) for row in matrix} | {len(matrix)}) != 1:
                raise ValueError("a mixing matrix is square: a row per replica")
            check_mixing(np.array(matrix))
        return matrix

    def build(self, ground: Ground) -> GossipRule:
        """Collective. The running rule.

        Raises:
            ConfigError: `matrix` is for another number of replicas.
        """
        size = ground.members.size
        if self.matrix is not None and len(self.matrix) != size:
            raise ConfigError(
                f"sync.matrix has {len(self.matrix)} rows and there are {size} replicas; give one "
                'row per replica, or a graph such as "ring"'
            )
        return GossipRule(self, ground)


class GossipRule(PeriodicRule):
    """Runs `Gossip`."""

    def __init__(self, config: Gossip, ground: Ground) -> None:
        self.phase: Phase = "before_update" if config.order == "before" else "after_update"
        super().__init__(config)
        self._config = config
        self._ground = ground
        self._n_held = 0

    def meet(self, at: Moment, vector_N: Tensor) -> None:
        """As `Rule.meet`."""
        members = self._ground.members
        tally = self._tally
        if self._config.measure_every and self._n_held % self._config.measure_every == 0:
            tally = {"consensus_distance": self._measure(vector_N)}
        weights = self._weights()
        me = members.rank
        if self._config.graph == "full" and self._config.matrix is None:
            members.mean(vector_N.numpy())
        else:
            sources = [j for j in range(members.size) if j != me and weights[me, j]]
            dests = [i for i in range(members.size) if i != me and weights[i, me]]
            arrived = members.receive(vector_N.numpy(), dests, sources)
            vector_N.mul_(float(weights[me, me]))
            for source, received in zip(sources, arrived, strict=True):
                vector_N.add_(torch.from_numpy(received), alpha=float(weights[me, source]))
        self._n_held += 1
        self.held(at, tally)

    def state(self) -> State:
        """Local."""
        return State(counters=self._trigger.counters() | {"held": self._n_held})

    def load_state(self, state: State) -> None:
        """Local."""
        self._trigger.load_counters(state.counters)
        self._n_held = int(state.counters["held"] or 0)

    def _weights(self) -> np.ndarray:
        if self._config.matrix is not None:
            return np.array(self._config.matrix)
        return mixing_matrix(self._config.graph, self._ground.members.size, self._n_held)

    def _measure(self, vector_N: Tensor) -> float:
        """Collective. The consensus distance, sqrt(mean of |x_i - mean|^2)."""
        mean_N = vector_N.clone()
        self._ground.members.mean(mean_N.numpy())
        apart = float(torch.dist(vector_N, mean_N) ** 2)
        distance = math.sqrt(self._ground.members.gather([apart]).mean())
        if not math.isfinite(distance):
            raise NonFinite("the parameters of a replica are inf or NaN")
        return distance
