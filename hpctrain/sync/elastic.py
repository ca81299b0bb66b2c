"""Elastic averaging: replicas and a centre are drawn to each other by a spring.

    every `every` steps, at the parameters x_i where the gradient was taken:
        x_i <- x_i - (beta / M) * (x_i - c)
        c   <- c + beta * (mean of x_i - c)          (x_i before the line above)

Without gradients the sum of all x_i and c is conserved: what replicas lose the centre gains. The
centre starts where the replicas start and is what is evaluated beside their average. Above SGD with
Nesterov momentum this is EAMSGD. Per meeting and rank: one all-reduce; memory: one vector.

Source: Zhang, Choromanska, LeCun 2015, "Deep learning with Elastic Averaging SGD", arXiv 1412.6651,
equations 5 and 6 with alpha = beta / M; every rank keeps the centre instead of a server, and a
single replica is left alone.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from hpctrain.errors import NonFinite
from hpctrain.state import Placed, State
from hpctrain.sync.elastic_polled import PolledElasticRule
from hpctrain.sync.rule import Ground, Moment, PeriodicRule, Phase
from hpctrain.sync.table import RuleTable


class Elastic(RuleTable):
    """[[sync]] kind = "elastic"."""

    kind: Literal["elastic"] = "elastic"
    """A centre and springs to it."""
    every: int = Field(default=10, ge=1)
    """Steps between two meetings."""
    beta: float = Field(default=0.9, gt=0.0, le=1.0)
    """How far the centre moves to the average; each replica moves beta / M to the centre. Above 1
    the centre would oscillate."""
    asynchronous: bool = False
    """Never wait: the centre lies in pieces on the members, who ask for it and add to it."""

    def build(self, ground: Ground) -> ElasticRule | PolledElasticRule:
        """Collective. The running rule."""
        if self.asynchronous:
            return PolledElasticRule(self.period, self.beta / ground.members.size, ground)
        return ElasticRule(self, ground)


class ElasticRule(PeriodicRule):
    """Runs `Elastic`.

    Attributes:
        centre_N: (N,) equal on all members.
    """

    phase: Phase = "before_update"

    def __init__(self, config: Elastic, ground: Ground) -> None:
        super().__init__(config)
        self._config = config
        self._members = ground.members
        self.centre_N = ground.payload.pack().clone()

    def meet(self, at: Moment, vector_N: Tensor) -> None:
        """As `Rule.meet`. Tells sqrt(mean of |x_i - c|^2)."""
        if self._members.size == 1:
            self.held(at, {})
            return
        mean_N = vector_N.clone()
        self._members.mean(mean_N.numpy())
        apart = float(torch.dist(vector_N, self.centre_N) ** 2)
        distance = math.sqrt(self._members.gather([apart]).mean())
        if not math.isfinite(distance):
            raise NonFinite("the parameters of a replica are inf or NaN")
        vector_N.lerp_(self.centre_N, self._config.beta / self._members.size)
        self.centre_N.lerp_(mean_N, self._config.beta)
        self.held(at, {"centre_distance": distance})

    def state(self) -> State:
        """The centre. Local."""
        centre = Placed(self.centre_N)
        return State({"centre": centre}, self._trigger.counters())

    def load_state(self, state: State) -> None:
        """Local."""
        self.centre_N.copy_(state.tensors["centre"].tensor)
        self._trigger.load_counters(state.counters)
