"""A batch in proportion to the gradient diversity of an epoch, as DiveBatch was released.

    after every `resize_every` epochs, as long as the batch is below batch_max:
        wanted = delta * n * Delta                  n * Delta = `Seen.epoch_diversity` of that epoch
        batch  = floor(min(max(wanted, batch), batch_max))          NaN and infinity: batch_max
        lr     = (what [lr] says) * batch / batch_global            with rescale_lr

The batch never shrinks. estimator = "epoch" takes n times (the sum over the epoch's samples of
|g_i|², each at the parameters it was used at) / |the sum of these gradients|²: cheap, and biased,
because the parameters move during the epoch; it says how far the epoch went rather than how diverse
the gradients of a point are. estimator = "oracle" takes both sums over the whole training set at
the end of the epoch: exact, and an epoch's worth of gradients more.

Source: Chen, Wang, Sundaram 2025, "DiveBatch", arXiv 2509.16173, and its released code, which has
delta = 0.1 (CIFAR-10), 0.01 (CIFAR-100, Tiny-ImageNet), 20 epochs and 2048 samples. Difference: the
bounds hold for any number of ranks, and nothing else is rebuilt when the batch changes.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from hpctrain.batch.lr import LrConfig
from hpctrain.batch.policy import Decision, Facts, Seen
from hpctrain.batch.table import AdaptiveTable, Need
from hpctrain.settings import Train
from hpctrain.state import State


class DiveBatch(AdaptiveTable):
    """[batch] kind = "divebatch": grows with the gradient diversity of whole epochs."""

    kind: Literal["divebatch"] = "divebatch"
    """The policy."""
    delta: float = Field(default=0.1, gt=0.0)
    """The batch is this fraction of n * Delta."""
    resize_every: int = Field(default=20, ge=1)
    """Epochs from one change to the next; the last of them is measured."""
    estimator: Literal["epoch", "oracle"] = "epoch"
    """Diversity along the epoch (biased), or of the whole training set at its end (exact)."""
    rescale_lr: bool = False
    """Scale the step size in proportion to the batch, with [lr] kind = "none"."""

    @property
    def needs(self) -> frozenset[Need]:
        """The diversity of epochs, one way or the other. Local."""
        return frozenset({self.estimator})

    def measures(self, epoch: int) -> bool:
        """Whether the diversity of that epoch, counted from 0, will be asked for. Local."""
        return (epoch + 1) % self.resize_every == 0

    def require_fit(self, train: Train, lr: LrConfig, *, exact: bool, own_pace: bool) -> None:
        """As any policy; its own scaling of the step size goes with no other. Local."""
        super().require_fit(train, lr, exact=exact, own_pace=own_pace)
        if self.rescale_lr and lr.kind != "none":
            raise ValueError(
                f'batch.rescale_lr and lr.kind = "{lr.kind}" both scale the step size with the '
                'batch; set lr.kind = "none" or drop rescale_lr'
            )

    def build(self) -> DiveBatchPolicy:
        """The running policy. Local."""
        return DiveBatchPolicy(self)


class DiveBatchPolicy:
    """Runs the rule at the top of this file.

    Args:
        table: Its configuration.
    """

    def __init__(self, table: DiveBatch) -> None:
        self._table = table
        self.batch = table.batch_global
        """What the steps take at present."""
        self.resized = 0
        """Epochs that had passed at the last look."""

    def decide(self, seen: Seen) -> Decision:
        """What the next step takes. Local."""
        table, passed = self._table, seen.samples // seen.samples_per_epoch
        due = passed > self.resized and table.measures(passed - 1)
        if not due or self.batch == table.batch_max:
            return Decision(self.batch, self._gain())
        self.resized = passed
        diversity, before = seen.epoch_diversity, self.batch
        if diversity is None:
            why = f"kept {before}: epoch {passed - 1} was not measured from its start"
            return Decision(before, self._gain(), why, {"action": "keep"})
        wanted = table.delta * diversity
        finite = math.isfinite(wanted)
        facts: Facts = {"epoch_diversity": diversity if finite else None}
        self.batch = table.within(max(wanted, before) if finite else table.batch_max)
        facts["action"] = "grow" if self.batch > before else "keep"
        said = f"n * Delta = {diversity:.4g} by estimator {table.estimator}, times {table.delta:g}"
        moved = f"{before} -> {self.batch}" if self.batch > before else f"kept {before}"
        return Decision(self.batch, self._gain(), f"{moved}: {said}", facts)

    def state(self) -> State:
        """The batch and the last look. Local."""
        return State(counters={"batch": self.batch, "resized": self.resized})

    def load_state(self, state: State) -> None:
        """Go on from there, within the present bounds. Local."""
        batch = state.counters.get("batch") or self._table.batch_global
        self.batch = self._table.within(int(batch))
        self.resized = int(state.counters.get("resized") or 0)

    def _gain(self) -> float:
        return self.batch / self._table.batch_global if self._table.rescale_lr else 1.0
