"""A run's rules as one: every step passes through all of them, innermost scope first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from hpctrain.state import State
from hpctrain.sync.leader import LeaderRule
from hpctrain.sync.leader_polled import PolledLeaderRule
from hpctrain.sync.payload import Payload
from hpctrain.sync.rule import Moment, Phase, Rule

Value = TypeVar("Value")


@dataclass(frozen=True)
class Running:
    """A rule at work."""

    name: str
    """Of its numbers in metrics.jsonl and its part of a checkpoint: place in the list, and kind."""
    rule: Rule
    payload: Payload


class Rules:
    """All rules of a run, in the order of the configuration; may be none."""

    def __init__(self, running: Sequence[Running]) -> None:
        self._running = list(running)

    @property
    def leader(self) -> int | None:
        """The replica that leads all, where the last rule is a leader's. Local."""
        tally = self._running[-1].rule.tally() if self._running else {}
        return int(tally["leader"]) if "leader" in tally else None

    @property
    def own_pace(self) -> bool:
        """Whether ranks make unequal numbers of steps. Local."""
        return any(running.rule.own_pace for running in self._running)

    @property
    def mends(self) -> bool:
        """Whether a replica whose parameters are not finite is brought back. Local."""
        return any(isinstance(r.rule, LeaderRule | PolledLeaderRule) for r in self._running)

    def before_update(self, at: Moment) -> None:
        """Collective. The rules that act on the parameters where the gradient was taken."""
        self._run("before_update", at)

    def after_update(self, at: Moment) -> None:
        """Collective. The rules that act on what the optimiser left."""
        self._run("after_update", at)

    def settle(self) -> None:
        """Collective. Nothing is under way afterwards."""
        for running in self._running:
            running.rule.settle()

    def tally(self) -> dict[str, float]:
        """Local. Numbers of all rules for metrics.jsonl."""
        return {
            f"{running.name}.{name}": value
            for running in self._running
            for name, value in running.rule.tally().items()
        }

    def remarks(self) -> list[str]:
        """Local. Warnings for people."""
        return [f"{r.name}: {text}" for r in self._running if (text := r.rule.remark())]

    def state(self) -> State:
        """Local, after `settle`."""
        return State.nested({running.name: running.rule.state() for running in self._running})

    def load_state(self, state: State) -> None:
        """Local.

        Raises:
            ConfigError: the state is of other rules.
        """
        for running in self._running:
            running.rule.load_state(state.below(running.name))

    def _run(self, phase: Phase, at: Moment) -> None:
        for running in self._running:
            rule = running.rule
            if rule.phase == phase:
                rule.observe(at)
                if rule.due(at):
                    rule.meet(at, running.payload.pack())
                    running.payload.unpack()
