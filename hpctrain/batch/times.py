"""How long a step takes, as a straight line through what was measured: t(B) = fixed + per_sample B.

Per batch size the median of the last steps stands for all of them, so a slow step here and there
(the first one, a checkpoint, a neighbour on the node) does not count.

Two batch sizes or more, the largest at least 1.5 times the smallest: weighted least squares through
their medians; a size weighs as many steps as it has, halved for every 200 steps since its last, and
is forgotten after 1000.

One batch size, or a line that is not positive: per_sample = compute_s / B and fixed = step_s -
compute_s of the latest size. That takes what a forward pass costs whatever its size for a cost per
sample, so B_half = fixed / per_sample comes out too small rather than too large, and a policy grows
too little rather than too much until it has seen a second size.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

import torch

from hpctrain.batch.policy import StepTimes
from hpctrain.state import Placed, State

WINDOW = 16
"""Steps of one batch size that are remembered."""
SIZES = 16
"""Batch sizes that are remembered."""
LEAST = 3
"""Steps of a batch size before it counts: the median of three stands one outlier."""
SPREAD = 1.5
"""Largest over smallest batch size, from which a slope is believed."""
HALF_LIFE = 200
"""Steps in which a size that no longer occurs loses half of its weight."""
MEMORY = 1000
"""Steps after which it is forgotten."""


@dataclass
class _Size:
    """The last steps of one batch size."""

    latest: int = 0
    """Number of the last of them, counted over all sizes."""
    rows: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """(step_s, compute_s), oldest first."""

    @property
    def step_s(self) -> float:
        return median(step_s for step_s, _ in self.rows)

    @property
    def compute_s(self) -> float:
        return median(compute_s for _, compute_s in self.rows)


class TimesFit:
    """Fits the line. All methods are local; what goes in is equal on all ranks, so is the line."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._added = 0

    def add(self, batch_global: int, step_s: float, compute_s: float) -> StepTimes | None:
        """Take one step in. Local.

        Args:
            batch_global: Samples it took, over all ranks.
            step_s: Its seconds, averaged over ranks.
            compute_s: Seconds of these in forward, backward and update, averaged over ranks.

        Returns:
            The line, both numbers positive; None before there is one.
        """
        if batch_global < 1 or not (0.0 < compute_s < math.inf and 0.0 < step_s < math.inf):
            return self.times
        self._added += 1
        size = self._sizes.pop(batch_global, None) or _Size()
        size.latest = self._added
        size.rows.append((step_s, compute_s))
        self._sizes[batch_global] = size
        while len(self._sizes) > SIZES or self._age(next(iter(self._sizes))) > MEMORY:
            del self._sizes[next(iter(self._sizes))]
        return self.times

    @property
    def times(self) -> StepTimes | None:
        """The line through what was taken in; None before there is one. Local."""
        ripe = {b: size for b, size in self._sizes.items() if len(size.rows) >= LEAST}
        if not ripe:
            return None
        line = self._line(ripe) if max(ripe) >= SPREAD * min(ripe) else None
        if line is None:
            latest, size = next(reversed(ripe.items()))
            line = StepTimes(size.step_s - size.compute_s, size.compute_s / latest, True)
        return line if line.fixed_s > 0.0 and line.per_sample_s > 0.0 else None

    def state(self) -> State:
        """The steps remembered, one per row: batch, number of its size's last, both seconds."""
        rows_N4 = torch.full((SIZES * WINDOW, 4), math.nan, dtype=torch.float64)
        rows = [
            (batch, size.latest, *row) for batch, size in self._sizes.items() for row in size.rows
        ]
        if rows:
            rows_N4[: len(rows)] = torch.tensor(rows, dtype=torch.float64)
        return State({"steps": Placed(rows_N4, resize="reset")}, {"added": self._added})

    def load_state(self, state: State) -> None:
        """Go on from there. Local. At another number of ranks other times hold: starts afresh."""
        self._sizes, self._added = {}, int(state.counters.get("added") or 0)
        if "steps" not in state.tensors:
            return
        for batch, latest, step_s, compute_s in state.tensors["steps"].tensor.tolist():
            if not math.isnan(batch):
                size = self._sizes.setdefault(int(batch), _Size(int(latest)))
                size.rows.append((step_s, compute_s))

    def _age(self, batch: int) -> int:
        return self._added - self._sizes[batch].latest

    def _line(self, ripe: dict[int, _Size]) -> StepTimes | None:
        """Weighted least squares; None where the line is not positive."""
        weights = {b: len(s.rows) * 0.5 ** (self._age(b) / HALF_LIFE) for b, s in ripe.items()}
        total = sum(weights.values())
        mean_b = sum(w * b for b, w in weights.items()) / total
        mean_s = sum(w * ripe[b].step_s for b, w in weights.items()) / total
        spread = sum(w * (b - mean_b) ** 2 for b, w in weights.items())
        rise = sum(w * (b - mean_b) * (ripe[b].step_s - mean_s) for b, w in weights.items())
        slope = rise / spread
        line = StepTimes(mean_s - slope * mean_b, slope)
        return line if line.fixed_s > 0.0 and slope > 0.0 else None
