"""Two tiny messages per step in which all ranks agree on what to do next.

Each rank contributes a few numbers: sums (its losses, whether they are finite, its seconds and
bytes) and maxima (whether it was asked to stop, how its checkpoint writer stands). The reduced
numbers, equal on all ranks, decide. Both reductions start before the step waits for its gradients
and end before the update, on a communicator of their own: they hide behind the gradient exchange.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from hpctrain.transport.communicator import Communicator, Handle


@dataclass
class Sums:
    """What one rank adds, or after `Control.wait` the sums over all ranks."""

    loss: float = 0.0
    """Sum of the losses of this step's samples."""
    correct: float = 0.0
    samples: float = 0.0
    """How many samples these are."""
    non_finite: float = 0.0
    """1 from a rank whose loss is inf or NaN."""
    step_s: float = 0.0
    """Cumulative up to the step before, as all below."""
    compute_s: float = 0.0
    exchange_s: float = 0.0
    sync_s: float = 0.0
    input_s: float = 0.0
    bytes_sent_intra: float = 0.0
    bytes_sent_inter: float = 0.0
    steps_timed: float = 0.0
    """Steps that the seconds are of."""
    samples_timed: float = 0.0
    measure_s: float = 0.0
    """Spent measuring gradients."""
    steps_done: float = 0.0
    """Cumulative, with this step, as below."""
    samples_done: float = 0.0
    groups: float = 0.0
    """What `meter.Squares` says of this step, as all below."""
    weighted_sq: float = 0.0
    pieces: float = 0.0
    piece_weighted_sq: float = 0.0


@dataclass
class Maxima:
    """What one rank says, or after `Control.wait` the maxima over all ranks."""

    stop_code: float = 0.0
    """Of `runs.signals`; 0 = go on."""
    saves: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """`Checkpointer.numbers()`."""
    seconds: float = 0.0
    """Since the start of the run."""
    pending: float = 0.0
    """1 while an earlier message to all ranks is under way, where ranks go at their own pace."""


class Control:
    """Reduces what the ranks say. Every method is collective.

    Args:
        comm: A communicator that nothing else uses.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._sums = np.zeros(len(fields(Sums)), dtype=np.float64)
        self._maxima = np.zeros(6, dtype=np.float64)
        self._handles: list[Handle] = []

    def start(self, sums: Sums, maxima: Maxima) -> None:
        """Collective. Send this rank's numbers without waiting."""
        self._sums[:] = [getattr(sums, field.name) for field in fields(Sums)]
        self._maxima[:] = [maxima.stop_code, *maxima.saves, maxima.seconds, maxima.pending]
        self._handles = [
            self._comm.iallreduce(self._sums),
            self._comm.iallreduce(self._maxima, "max"),
        ]

    def wait(self) -> tuple[Sums, Maxima]:
        """Collective. The numbers reduced over all ranks."""
        assert self._handles, "wait() without start()"
        for handle in self._handles:
            handle.wait()
        self._handles = []
        stop_code, done, failed, wanted, seconds, pending = self._maxima.tolist()
        maxima = Maxima(stop_code, (done, failed, wanted), seconds, pending)
        return Sums(*self._sums.tolist()), maxima

    def test(self) -> bool:
        """Whether `wait` would return at once. Local."""
        return all([handle.test() for handle in self._handles])

    def reduce_max(self, vector: np.ndarray) -> None:
        """Collective. In-place maximum of a float64 vector, for waits outside the loop."""
        self._comm.allreduce(vector, "max")

    def ranks_with(self, condition: bool) -> list[int]:
        """Collective. The ranks on which `condition` holds."""
        answers = self._comm.allgather_bytes(b"\1" if condition else b"\0")
        return [rank for rank, answer in enumerate(answers) if answer == b"\1"]
