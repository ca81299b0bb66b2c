"""Leader SGD: replicas are pulled to the best of them, not to their average.

    every `every` steps:  leader = the member with the smallest score
                          x_i <- x_i + pull * (x_leader - x_i)         (the leader stays)
    with a drip, after every step since:
                          x_i <- x_i + drip / every * (x_leader - x_i)   (the leader as it was)

One rule with scope "world" is LSGD; one with scope "node" before one with scope "world" is
multi-leader LSGD: local leaders often, the global one now and then. Only the leader's vector
travels, once over each node's link: half of what an all-reduce sends. Memory: one vector; the
election sends one number per member.

A score that is not finite counts as the worst, and a replica whose parameters are not finite takes
the leader's whole. Ties go to the member that a hash of (seed, step) puts first.

Source: Teng, Gao, Chalus, Choromanska, Goldfarb, Weller 2019, "Leader Stochastic Gradient Descent
for Distributed Training of Deep Learning Models", arXiv 1905.10395, algorithms 1 and 2. As there,
the pull is not multiplied by the step size; `pull_follows_lr` scales it by lr / lr.base, as their
theorem on noisy elections asks. The drip is in the authors' code, not in the paper; there the
leader too is pulled to where it was, here it is not.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Literal
from zlib import crc32

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from hpctrain.errors import NonFinite
from hpctrain.state import Placed, State
from hpctrain.sync.leader_polled import PolledLeaderRule
from hpctrain.sync.rule import Ground, Moment, PeriodicRule
from hpctrain.sync.score import ProbeLoss, Score, TrainLoss
from hpctrain.sync.table import RuleTable

_RECENT = 20
"""Elections that a leader's share is taken over."""
_STICKY = 0.6


class Leader(RuleTable):
    """[[sync]] kind = "leader"."""

    kind: Literal["leader"] = "leader"
    """The best replica leads."""
    pull: float = Field(default=0.1, gt=0.0, le=1.0)
    """How far the others move to it at a meeting: lambda of the paper."""
    pull_follows_lr: bool = False
    """Scale the pull with lr / lr.base, so that it falls with the schedule."""
    drip: float = Field(default=0.0, ge=0.0, lt=1.0)
    """A further pull, spread evenly over the steps of a round; 0 = none."""
    asynchronous: bool = False
    """Never wait: scores and parameters are posted, and taken when they have come."""
    expires: int = Field(default=4, ge=1)
    """With asynchronous = true, periods after which a score no longer counts."""
    score: Literal["train_loss", "probe"] = "train_loss"
    """What is compared: training losses, or the loss over one probe batch for all."""
    window: int = Field(default=10, ge=1)
    """Steps that the training loss is averaged over."""
    probe_samples: int = Field(default=256, ge=1)
    """Training samples kept aside for the probe."""

    @model_validator(mode="after")
    def _used(self) -> Leader:
        if self.score == "probe" and self._changed("window"):
            raise ValueError('window has no effect with score = "probe"; drop it')
        if self.score == "train_loss" and self._changed("probe_samples"):
            raise ValueError('probe_samples has no effect with score = "train_loss"; drop it')
        if self.asynchronous and self.drip:
            raise ValueError("asynchronous = true takes no drip")
        if not self.asynchronous and self._changed("expires"):
            raise ValueError("expires has no effect without asynchronous = true; drop it")
        return self

    def pull_at(self, lr: float, lr_base: float) -> float:
        """The pull at that step size. Local."""
        return self.pull * (lr / lr_base if self.pull_follows_lr else 1.0)

    def build(self, ground: Ground) -> LeaderRule | PolledLeaderRule:
        """Collective. The running rule."""
        inside = ground.members.inside
        score: Score = TrainLoss(inside, self.window)
        if self.score == "probe":
            assert ground.probe is not None
            score = ProbeLoss(inside, ground.probe)
        if self.asynchronous:
            return PolledLeaderRule(self, score, ground)
        return LeaderRule(self, score, ground)


class LeaderRule(PeriodicRule):
    """Runs `Leader`."""

    def __init__(self, config: Leader, score: Score, ground: Ground) -> None:
        super().__init__(config)
        self._config = config
        self._ground = ground
        self._score = score
        self._leader_N = torch.empty(ground.payload.size, dtype=ground.payload.dtype)
        self._dripping = False
        self._recent: deque[int] = deque(maxlen=_RECENT)

    def observe(self, at: Moment) -> None:
        """Note the loss; pull a little to the last leader where the config says so. Local."""
        self._score.observe(at.loss_sum, at.samples)
        if self._dripping:
            share = self._config.drip / self._config.period(at.epoch)
            vector_N = self._ground.payload.pack()
            vector_N.lerp_(self._leader_N, share)
            self._ground.payload.unpack(met=False)

    def meet(self, at: Moment, vector_N: Tensor) -> None:
        """As `Rule.meet`."""
        members = self._ground.members
        finite = bool(torch.isfinite(vector_N).all())
        scores_M = members.gather([self._score.value() if finite else math.inf])[:, 0]
        if not np.isfinite(scores_M).any():
            raise NonFinite(
                f"no replica has finite parameters and a finite score at step {at.step}"
            )
        leader = self._elect(scores_M, at.step)
        if members.rank == leader:
            self._leader_N.copy_(vector_N)
        members.broadcast(self._leader_N.numpy(), leader)
        if members.rank != leader:
            pull = self._config.pull_at(at.lr, self._ground.lr_base)
            if finite and pull < 1.0:
                vector_N.lerp_(self._leader_N, pull)
            else:
                vector_N.copy_(self._leader_N)
        self._recent.append(leader)
        self._dripping = self._config.drip > 0.0 and members.rank != leader
        share = self._recent.count(leader) / len(self._recent)
        score = float(scores_M[leader])
        self.held(at, {"leader": leader, "leader_score": score, "leader_share": share})

    def remark(self) -> str:
        """A warning for people, "" without one. Local."""
        if len(self._recent) < _RECENT:
            return ""
        leader, times = Counter(self._recent).most_common(1)[0]
        if times <= _STICKY * _RECENT or self._ground.members.size < 3:
            return ""
        return (
            f"replica {leader} led {times} of the last {_RECENT} elections: a leader that never "
            'changes drags the others; use score = "probe" or reshuffled data, or a smaller pull'
        )

    def state(self) -> State:
        """The last leader's vector where it drips, the score's memory. Local."""
        score = self._score.state()
        tensors = {f"score.{name}": placed for name, placed in score.tensors.items()}
        recent = torch.full((_RECENT,), -1, dtype=torch.int64)
        recent[: len(self._recent)] = torch.tensor(list(self._recent), dtype=torch.int64)
        tensors["recent"] = Placed(recent, "per_rank", "reset")
        if self._config.drip:
            tensors["leader"] = Placed(self._leader_N, "per_rank", "reset")
        counters = {f"score.{name}": value for name, value in score.counters.items()}
        return State(tensors, counters | self._trigger.counters())

    def load_state(self, state: State) -> None:
        """Local. At another number of ranks elections count afresh; the next starts the drip."""
        self._trigger.load_counters(state.counters)
        self._score.load_state(
            State(
                {n.removeprefix("score."): p for n, p in state.tensors.items() if "." in n},
                {n.removeprefix("score."): c for n, c in state.counters.items() if "." in n},
            )
        )
        if "recent" in state.tensors:
            recent = state.tensors["recent"].tensor.tolist()
            self._recent.extend(leader for leader in recent if leader >= 0)
        if "leader" in state.tensors:
            self._leader_N.copy_(state.tensors["leader"].tensor)
            self._dripping = self._recent[-1] != self._ground.members.rank

    def _elect(self, scores_M: np.ndarray, step: int) -> int:
        """The member with the smallest score; equal on all members. Local."""
        best = np.flatnonzero(scores_M == scores_M.min())
        return int(best[crc32(f"{self._ground.seed} {step}".encode()) % len(best)])
