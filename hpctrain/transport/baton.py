"""The baton: lets one rank's thread run at a time and decides, repeatably, who runs next.

A rank runs until it calls the communicator; there it hands the baton to the next rank, in rank
order, that can go on. Torch's, Python's and numpy's global random states change hands with it, so
each rank sees the random numbers it would see in a process of its own.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


class RankError(RuntimeError):
    """A rank raised; the exception it raised is the cause."""

    def __init__(self, rank: int, size: int, cause: BaseException) -> None:
        super().__init__(f"rank {rank} of {size} raised {type(cause).__name__}: {cause}")
        self.rank = rank


class DeadlockError(RuntimeError):
    """Every rank waits for another one; the message says for what."""


class Released(BaseException):
    """Unwinds a rank because another one failed. Not an Exception: user code must not catch it."""


@dataclass
class _RandomStates:
    """The process's global random states; CUDA's are not among them."""

    torch: torch.Tensor = field(default_factory=torch.get_rng_state)
    python: Any = field(default_factory=random.getstate)
    numpy: Any = field(default_factory=lambda: np.random.get_state(legacy=False))  # noqa: NPY002

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - user code may use it


@dataclass
class _Waiting:
    ready: Callable[[], bool]
    what: Callable[[], str]


class Baton:
    """Schedules `size` rank threads one at a time.

    Args:
        size: number of ranks.
        interleave: ranks to prefer at successive hand-overs (a scripted interleaving); a rank that
            cannot go on, and the end of the script, fall back to the next rank in rank order.
        only_waits: a rank keeps the baton until it must wait for another one, or polls.
    """

    def __init__(
        self, size: int, interleave: Iterable[int] = (), *, only_waits: bool = False
    ) -> None:
        self.size = size
        self.only_waits = only_waits
        self.failure: BaseException | None = None
        self._script = iter(interleave)
        self._gates = [threading.Semaphore(0) for _ in range(size)]
        self._waiting: list[_Waiting | None] = [None] * size
        self._finished = [False] * size
        self._states = [_RandomStates() for _ in range(size)]
        self._all_done = threading.Event()

    def run(self, bodies: list[Callable[[], None]]) -> None:
        """Run one body per rank to its end; re-raise the first failure.

        Raises:
            RankError: a body raised.
            DeadlockError: all unfinished ranks waited.
        """
        before = _RandomStates()
        threads = [
            threading.Thread(target=self._body, args=(rank, body), name=f"rank-{rank}", daemon=True)
            for rank, body in enumerate(bodies)
        ]
        for thread in threads:
            thread.start()
        self._gates[0].release()
        try:
            self._all_done.wait()
        except BaseException as interrupt:  # Ctrl-C must free the ranks
            self.failure = self.failure or interrupt
            self._all_done.wait()
        for thread in threads:
            thread.join()
        before.restore()
        if self.failure is not None:
            raise self.failure

    def pass_on(self, rank: int, *, polls: bool = False) -> None:
        """Give the other ranks their turn; returns when this rank has the baton again.

        Args:
            rank: the one that holds it.
            polls: it looks for what others may do meanwhile.
        """
        if polls or not self.only_waits:
            self._hand_over(rank)

    def wait(self, rank: int, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Return once `ready()`; `what()` says for people what is waited for."""
        if self.only_waits and self.failure is None and ready():
            return
        self._waiting[rank] = _Waiting(ready, what)
        self._hand_over(rank)
        self._waiting[rank] = None

    def _body(self, rank: int, body: Callable[[], None]) -> None:
        self._gates[rank].acquire()
        try:
            if self.failure is None:
                self._states[rank].restore()
                body()
        except Released:
            pass
        except BaseException as error:  # run() reports whatever a rank raises
            if self.failure is None:
                self.failure = RankError(rank, self.size, error)
                self.failure.__cause__ = error
        self._finished[rank] = True
        follower = self._choose(rank)
        if follower is None:
            self._all_done.set()
        else:
            self._gates[follower].release()

    def _hand_over(self, rank: int) -> None:
        if self.failure is not None:
            raise Released
        follower = self._choose(rank)
        assert follower is not None
        if follower != rank:
            self._states[rank] = _RandomStates()
            self._gates[follower].release()
            self._gates[rank].acquire()
            if self.failure is None:
                self._states[rank].restore()
        if self.failure is not None:
            raise Released

    def _choose(self, rank: int) -> int | None:
        """Who runs next; None when all have finished. Sets `failure` on a deadlock."""
        scripted = next(self._script, None)
        in_turn = [(rank + step) % self.size for step in range(1, self.size + 1)]
        alive = [other for other in in_turn if not self._finished[other]]
        if not alive:
            return None
        if self.failure is None:
            if scripted in alive and self._can_go_on(scripted):
                return scripted
            for other in alive:
                if self._can_go_on(other):
                    return other
            self.failure = DeadlockError(self._describe())
        return alive[0]

    def _can_go_on(self, rank: int) -> bool:
        waiting = self._waiting[rank]
        return waiting is None or waiting.ready()

    def _describe(self) -> str:
        lines = ["deadlock: every rank that still runs waits for another one:"]
        for rank, waiting in enumerate(self._waiting):
            if self._finished[rank]:
                lines.append(f"  rank {rank} has returned")
            elif waiting is not None:
                lines.append(f"  rank {rank} waits {waiting.what()}")
        return "\n".join(lines)
