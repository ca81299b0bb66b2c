"""Leader SGD in which nobody waits: scores are posted, the leader is asked for its parameters.

    every `every` steps of its own a member posts (score, step) to the others, and asks the best one
    it knows of, if that is another; when the answer has come, some steps later:
        x_i <- x_i + pull * (x_leader - x_i)

A score counts for `expires` periods of the member that reads it: what a straggler scored long ago
leads nobody. An answer carries the leader's step, and how far it is behind is counted. One question
at a time. Per exchange a member receives the vector once and sends 16 bytes to each other member.

Source: as `leader`; the paper's asynchronous algorithm counts everybody's steps together and meets
for the election, this one never meets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpctrain.state import State
from hpctrain.sync.rule import Ground, Moment, PolledRule
from hpctrain.sync.score import Score

if TYPE_CHECKING:
    from hpctrain.sync.leader import Leader

_SCORE_BYTES, _ASK_BYTES = 16, 8


@dataclass
class _Known:
    """What a member last said of itself."""

    score: float = math.inf
    arrived: int = 0
    """This member's step at which it came."""


class PolledLeaderRule(PolledRule):
    """Runs `Leader` with `asynchronous = true`.

    Args:
        config: The rule.
        score: This member's own.
        ground: What to work with.
    """

    def __init__(self, config: Leader, score: Score, ground: Ground) -> None:
        self._config = config
        self._lr_base = ground.lr_base
        self._score = score
        self._payload = ground.payload
        self._members = ground.members
        self._box = ground.members.mailbox()
        self._known = [_Known() for _ in range(ground.members.size)]
        self._elected = 0
        self._asked: int | None = None
        self.pulls = 0
        self.staleness = 0
        """Steps by which the last leader's parameters were behind this member's own."""

    def observe(self, at: Moment) -> None:
        """Note the loss, answer others, be pulled, hold an election when it is time.

        Collective over the replica.
        """
        self._score.observe(at.loss_sum, at.samples)
        if self._members.size == 1:
            return
        self._take(self._box.poll(), at)
        if at.step - self._elected >= self._config.period(at.epoch):
            self._elected = at.step
            self._elect(at)

    def settle(self) -> None:
        """As `Rule.settle`. A question under way is given up."""
        if self._members.size > 1:
            self._box.drain()
            self._box.drain()
            self._asked = None

    def tally(self) -> dict[str, float]:
        """As `Rule.tally`: this member's pulls and the staleness of the last one."""
        return {"pulls": self.pulls, "staleness": self.staleness}

    def state(self) -> State:
        """The score's memory. Local, after `settle`; what others said is asked for again."""
        return self._score.state()

    def load_state(self, state: State) -> None:
        """Local."""
        self._score.load_state(state)

    def _elect(self, at: Moment) -> None:
        vector_N = self._payload.pack()
        score = self._score.value() if bool(torch.isfinite(vector_N).all()) else math.inf
        others = [rank for rank in range(self._members.size) if rank != self._members.rank]
        for other in others:
            self._box.post(other, np.array([score, at.step], np.float64))
        self._known[self._members.rank] = _Known(score, at.step)
        oldest = at.step - self._config.expires * self._config.period(at.epoch)
        fresh = [
            (known.score, rank)
            for rank, known in enumerate(self._known)
            if known.arrived >= oldest and known.score < math.inf
        ]
        leader = min(fresh, default=(math.inf, self._members.rank))[1]
        if leader != self._members.rank and self._asked is None:
            self._asked = leader
            self._box.post(leader, np.zeros(_ASK_BYTES, np.uint8))

    def _take(self, messages: list[tuple[int, np.ndarray]], at: Moment) -> None:
        for source, payload in messages:
            if payload.nbytes == _SCORE_BYTES:
                score, _ = payload.view(np.float64).tolist()
                self._known[source] = _Known(score, at.step)
            elif payload.nbytes == _ASK_BYTES:
                self._answer(source, at)
            elif source == self._asked:
                self._asked = None
                self._follow(payload, at)

    def _answer(self, source: int, at: Moment) -> None:
        vector = self._payload.pack().numpy().view(np.uint8)
        message = np.empty(_SCORE_BYTES + vector.nbytes, np.uint8)
        message[:8] = np.array([at.step], np.int64).view(np.uint8)
        message[_SCORE_BYTES:] = vector
        self._box.post(source, message)

    def _follow(self, payload: np.ndarray, at: Moment) -> None:
        vector_N = self._payload.pack()
        leader = payload[_SCORE_BYTES:].view(vector_N.numpy().dtype)
        leader_N = torch.from_numpy(leader)
        if not bool(torch.isfinite(leader_N).all()):
            return
        if bool(torch.isfinite(vector_N).all()):
            vector_N.lerp_(leader_N, self._config.pull_at(at.lr, self._lr_base))
        else:
            vector_N.copy_(leader_N)
        self._payload.unpack()
        self.pulls += 1
        self.staleness = at.step - int(payload[:8].view(np.int64)[0])
