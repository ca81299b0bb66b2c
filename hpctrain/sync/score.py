"""How good a replica is, for the election of a leader: smaller is better.

    train_loss: the mean of the replica's last `window` training losses
    probe:      the mean loss over a fixed batch that no replica trains on, equal for all

The training loss is what Leader SGD uses; it is fair where every worker samples from the whole set.
With fixed shards it favours whoever has the easiest samples, and one worker leads nearly always;
the probe has no such bias and costs one forward pass of `probe_samples` per election, shared by the
ranks of a replica.

Source of train_loss: Teng et al. 2019, arXiv 1905.10395, and the authors' code, whose window of
zeros at the start of training is left out here: the mean is over the losses that there are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from hpctrain.state import Placed, State
from hpctrain.transport.communicator import Communicator


class Score(Protocol):
    """The score of this rank's replica."""

    def observe(self, loss_sum: float, samples: int) -> None:
        """Note a step's loss on this rank. Local."""
        ...

    def value(self) -> float:
        """Collective over the replica. The score, equal on its ranks; inf if not finite."""
        ...

    def state(self) -> State: ...

    def load_state(self, state: State) -> None: ...


class TrainLoss:
    """The running mean of the replica's training loss.

    Args:
        inside: The replica's ranks.
        window: Steps that the mean covers.
    """

    def __init__(self, inside: Communicator, window: int) -> None:
        self._inside = inside
        self._window = window
        self._last: deque[tuple[float, int]] = deque(maxlen=window)

    def observe(self, loss_sum: float, samples: int) -> None:
        """As `Score.observe`."""
        self._last.append((loss_sum, samples))

    def value(self) -> float:
        """As `Score.value`. inf before the first step."""
        sums = np.array(self._last, np.float64).reshape(-1, 2).sum(0)
        return _mean(self._inside, sums)

    def state(self) -> State:
        """(window, 2) losses and samples, each rank's own; others in number start afresh. Local."""
        rows = torch.zeros(self._window, 2, dtype=torch.float64)
        for row, seen in zip(rows, self._last, strict=False):
            row[:] = torch.tensor(seen)
        return State({"window": Placed(rows, "per_rank", "reset")}, {"seen": len(self._last)})

    def load_state(self, state: State) -> None:
        """Local."""
        self._last.clear()
        if "window" in state.tensors:
            seen = int(state.counters["seen"] or 0)
            rows = state.tensors["window"].tensor[:seen].tolist()
            self._last.extend((loss, int(samples)) for loss, samples in rows)


class ProbeLoss:
    """The loss over the probe batch.

    Args:
        inside: The replica's ranks.
        forward: (this rank's share of the probe) -> (sum of losses, samples), now; local.
    """

    def __init__(self, inside: Communicator, forward: Callable[[], tuple[float, int]]) -> None:
        self._inside = inside
        self._forward = forward

    def observe(self, loss_sum: float, samples: int) -> None:
        """The training loss does not count. Local."""

    def value(self) -> float:
        """As `Score.value`."""
        return _mean(self._inside, np.array(self._forward(), np.float64))

    def state(self) -> State:
        """Nothing is remembered. Local."""
        return State()

    def load_state(self, state: State) -> None:
        """Nothing to take back. Local."""


def _mean(inside: Communicator, sums: np.ndarray) -> float:
    if inside.size > 1:
        inside.allreduce(sums)
    loss, samples = sums.tolist()
    mean = loss / samples if samples else math.inf
    return mean if math.isfinite(mean) else math.inf
