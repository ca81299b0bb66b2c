"""Measures the gradient noise of a run while it trains, in the form that `forms.py` chooses.

What is measured is the gradient of the data: before compression, clipping, decay and penalties.
The time spent is measured too; where it is over 1 % of a step, every second, fourth, ... step is
measured, unless `batch.measure = "on"` asks for all of them. The seconds of the halves on steps
that are split count as computing.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict

import numpy as np
import torch

from hpctrain.config import Run
from hpctrain.control import Sums
from hpctrain.data.loader import Batch, MicroBatches
from hpctrain.forms import Form, choose_form
from hpctrain.meter import Meter, Squares
from hpctrain.models.flat import FlatModel
from hpctrain.sketches import Sketch, Sketches
from hpctrain.state import Counter, Placed, State
from hpctrain.stats.average import NoiseAverage
from hpctrain.stats.noise import GroupSums, NoiseEstimate
from hpctrain.stats.skew import DataSkew, data_skew, within_ranks
from hpctrain.throttle import Throttle
from hpctrain.transport.communicator import Communicator

PIECES_EVERY = 8
"""Measured steps from one that is split to the next, on a single rank."""
INSIDE_EVERY = 64
"""Measured steps from one look inside ranks of several micro-batches to the next."""
_LOOKS = 64
"""Looks inside the ranks that are remembered."""


class Measurement:
    """The gradient noise of one run. Collective to make.

    Args:
        form: From `choose_form`.
        comm: All ranks.
        flat: The model.
        seed: Of the sketches; equal on all ranks.
        sketch_every: Measured steps from one sketch to the next.
        throttled: Whether to measure less often where it costs too much.
    """

    @classmethod
    def of(
        cls,
        run: Run,
        comm: Communicator,
        flat: FlatModel,
        replicas: int,
        *,
        own_pace: bool,
    ) -> Measurement:
        """Collective. As a run needs it.

        Raises:
            ConfigError: it is needed and cannot be had.
        """
        form = choose_form(
            run.batch.measure,
            needed=run.needs_noise,
            exact=run.exchange.exact,
            ranks=comm.size,
            replicas=replicas,
            own_pace=own_pace,
        )
        return cls(
            form,
            comm,
            flat,
            run.seed,
            sketch_every=4 if replicas == 1 else 8,
            throttled=run.batch.measure == "auto" and "epoch" not in run.batch.needs,
        )

    def __init__(
        self,
        form: Form,
        comm: Communicator,
        flat: FlatModel,
        seed: int,
        *,
        sketch_every: int = 4,
        throttled: bool = True,
    ) -> None:
        self.form, self._seed = form, seed
        self._ranks = comm.size
        self._sketch_every, self._throttled = sketch_every, throttled
        self._meter = Meter(flat)
        self._sketches = Sketches(comm) if form == "sketch" else None
        self._sketch: Sketch | None = None
        self._arrived: GroupSums | None = None
        self._measuring = False
        self._average = NoiseAverage()
        self._skew: DataSkew | None = None
        self._looks: deque[tuple[float, float]] = deque(maxlen=_LOOKS)
        """(noise between ranks, noise inside them) of the last looks inside."""
        self._throttle = Throttle()
        self.latest: GroupSums | None = None
        """The last measured step's own."""

    @property
    def seconds(self) -> float:
        """Spent measuring since the start, on this rank."""
        return self._meter.seconds

    def estimate(self) -> NoiseEstimate | None:
        """The noise as known now; None before it is. Local, equal on all ranks."""
        began = time.perf_counter()
        found = self._average.estimate()
        self._meter.seconds += time.perf_counter() - began
        return found

    def begin(self, step: int, batch: Batch) -> MicroBatches | tuple[()]:
        """A step begins; the micro-batches to take it in. Collective when a sketch ends."""
        every = self._throttle.every
        nth, rest = divmod(step, every)
        pieces = (self.form == "pieces" and nth % PIECES_EVERY == 0) or (
            self.form == "groups" and nth % INSIDE_EVERY == 0
        )
        sketch = nth % self._sketch_every == 0
        due = {"off": False, "groups": True, "pieces": pieces, "sketch": sketch}
        self._measuring = rest == 0 and due[self.form]
        if not self._measuring:
            return batch.micro_batches
        if self._sketches is not None:
            self.settle()
            if self._arrived is not None:
                self._take(self._arrived)
                self._arrived = None
            self._sketch = Sketch(self._seed * 1_000_003 + step)
        self._meter.begin(batch.batch_replica, pieces=pieces, sketch=self._sketch)
        whole = batch.micro_batches
        if self.form == "pieces" and isinstance(whole, MicroBatches) and len(whole) == 1:
            return whole.halved()
        return whole

    def piece(self, samples: int) -> None:
        """The next backward pass is of so many samples. Local."""
        self._meter.piece(samples)

    def end(self, batch: Batch) -> Squares:
        """Backward is over; what this rank says of it. Collective when a sketch starts."""
        if not self._measuring:
            return Squares()
        squares = self._meter.end(batch.batch_local)
        if self._sketches is not None and self._sketch is not None:
            self._sketches.start(self._sketch, batch.batch_replica, batch.batch_local)
            self._sketch = None
            return Squares()
        return squares

    def settled(self, sums: Sums, samples: int) -> GroupSums | None:
        """The exchange has left the mean gradient. Local; equal on all ranks.

        Args:
            sums: What the ranks of the replica said of the step.
            samples: Of the step.

        Returns:
            What the step's ranks add up to; None where it was not measured so.
        """
        if not self._measuring or self.form in ("off", "sketch"):
            return None
        groups, weighted_sq = sums.groups, sums.weighted_sq
        if self.form == "pieces":
            groups, weighted_sq = sums.pieces, sums.piece_weighted_sq
        if groups < 2:
            return None
        mean_sq = self._meter.mean_sq() if self.form == "groups" else sums.weighted_sq / samples
        found = GroupSums(groups, samples, weighted_sq, mean_sq)
        self._take(found)
        if self.form == "groups" and sums.pieces > groups:
            inside = within_ranks(sums.piece_weighted_sq, weighted_sq, sums.pieces, groups)
            self._looks.append((found.moments()[0], inside))
            self._compare()
        return found

    def hear(self, sums: Sums) -> None:
        """Take in what all ranks have spent. Local."""
        if self._throttled:
            self._throttle.hear(sums, self._ranks)

    def settle(self) -> None:
        """Collective. Wait for the sketch under way, if any; it counts when the next one is due."""
        found = self._sketches.drain() if self._sketches is not None else None
        if found is not None and found.groups >= 2:
            self._arrived = found

    def tally(self) -> dict[str, float | None]:
        """Numbers for metrics.jsonl. Local."""
        estimate = self.estimate()
        if estimate is None:
            return {}
        return {
            "bs_bound": estimate.b_s if estimate.resolved else None,
            "bs_low": estimate.low,
            "bs_high": estimate.high if estimate.resolved else None,
            "noise_s2": estimate.s2,
            "noise_mu2": estimate.mu2,
            "data_skew": self._skew.ratio if self._skew else None,
            "measure_share": self._throttle.share,
            "measure_every": self._throttle.every,
        }

    def remarks(self) -> list[str]:
        """Warnings for people. Local."""
        if self._skew is None or not self._skew.skewed:
            return []
        return [
            "gradients differ more between ranks than inside them: ranks do not see the same data "
            "(sorted or partitioned?), and the measured B_S is too large"
        ]

    def state(self) -> State:
        """Local, after `settle`."""
        looks = torch.tensor(list(self._looks), dtype=torch.float64).view(-1, 2)
        counters: dict[str, Counter] = {"every": self._throttle.every}
        for name, sums in (("arrived", self._arrived), ("latest", self.latest)):
            if sums is not None:
                counters |= {f"{name}.{key}": value for key, value in asdict(sums).items()}
        here = State({"looks": Placed(looks)}, counters)
        average = State.nested({"average": self._average.state()})
        return State(here.tensors | average.tensors, here.counters | average.counters)

    def load_state(self, state: State) -> None:
        """Local."""
        self._average.load_state(state.below("average"))
        self._looks.clear()
        self._looks.extend((b, i) for b, i in state.tensors["looks"].tensor.tolist())
        self._compare()
        self._throttle.every = int(state.counters["every"] or 1)
        self._arrived = _group_sums(state.below("arrived"))
        self.latest = _group_sums(state.below("latest"))

    def _compare(self) -> None:
        """Whether ranks see unlike data, as far as the looks tell."""
        between_n, inside_n = np.array(self._looks).reshape(-1, 2).T
        self._skew = data_skew(between_n, inside_n)

    def _take(self, found: GroupSums) -> None:
        self._average.add(found)
        self.latest = found


def _group_sums(state: State) -> GroupSums | None:
    counters = {name: float(value or 0.0) for name, value in state.counters.items()}
    return GroupSums(**counters) if counters else None
