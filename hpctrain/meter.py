"""Squares of this rank's gradient, taken while a step makes it. Every method is local.

With L the loss of a step, a mean over the B samples of a replica, backward leaves

    G = sum of a rank's b samples' gradients / B,   so   b |g|² = B² |G|² / b   for their mean g.

The share of a rank is measured bucket by bucket, as backward completes them and before an exchange
touches them. On some steps the micro-batches are measured too, by hooks that see each gradient
before it is added to those before it: no second buffer, no further pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpctrain.models.flat import FlatModel
from hpctrain.sketches import Sketch


@dataclass(frozen=True)
class Squares:
    """What one rank measured of one step; adds up over ranks."""

    groups: float = 0.0
    """1 from a rank with samples."""
    weighted_sq: float = 0.0
    """b |g|², b its samples and g their mean gradient."""
    pieces: float = 0.0
    """Micro-batches that were measured one by one."""
    piece_weighted_sq: float = 0.0
    """The sum over them of the same."""


class Meter:
    """Measures the gradients of a step. Between `begin` and `end` it watches the flat gradient.

    Args:
        flat: The model.
    """

    def __init__(self, flat: FlatModel) -> None:
        self._flat = flat
        self.seconds = 0.0
        """Spent here since the start."""
        self._sketch: Sketch | None = None
        self._seen: list[tuple[int, int]] = []
        self._whole_sq: list[Tensor] = []
        self._piece_sq: list[Tensor] = []
        self._piece_weight = 0.0
        self._pieces = 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._batch_replica = 0

    def begin(
        self, batch_replica: int, *, pieces: bool = False, sketch: Sketch | None = None
    ) -> None:
        """The next step is measured.

        Args:
            batch_replica: Samples of the step over the ranks of the replica.
            pieces: Measure every micro-batch too.
            sketch: Takes the gradient in as well.
        """
        self._batch_replica, self._sketch = batch_replica, sketch
        self._seen, self._whole_sq, self._piece_sq, self._pieces = [], [], [], 0
        self._flat.on_ready = self._see
        if pieces:
            self._hooks = [p.register_hook(self._see_piece) for p in self._flat.parameters]

    def piece(self, samples: int) -> None:
        """The next backward pass is of so many samples."""
        if self._hooks:
            self._pieces += 1
            self._piece_weight = self._batch_replica**2 / samples

    def end(self, batch_local: int) -> Squares:
        """The step's backward passes are done; what they left.

        Args:
            batch_local: Samples of this rank.
        """
        began = time.perf_counter()
        at = 0
        for start, stop in [*sorted(self._seen), (self._flat.n_params,) * 2]:
            if at < start:  # no backward completed these: unused parameters, no samples
                self._see(at, start)
            at = stop
        self._flat.on_ready = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        found = Squares()
        if batch_local:
            weight = self._batch_replica**2 / batch_local
            found = Squares(
                1.0, weight * _total(self._whole_sq), self._pieces, _total(self._piece_sq)
            )
        self.seconds += time.perf_counter() - began
        return found

    def mean_sq(self) -> float:
        """Squared length of the flat gradient as it stands."""
        began = time.perf_counter()
        found = float(_square(self._flat.grads_P))
        self.seconds += time.perf_counter() - began
        return found

    def _see(self, start: int, stop: int) -> None:
        began = time.perf_counter()
        part = self._flat.grads_P[start:stop]
        self._seen.append((start, stop))
        self._whole_sq.append(_square(part))
        if self._sketch is not None:
            self._sketch.add(start, part)
        self.seconds += time.perf_counter() - began

    def _see_piece(self, grad: Tensor) -> None:
        began = time.perf_counter()
        self._piece_sq.append(_square(grad.flatten()) * self._piece_weight)
        self.seconds += time.perf_counter() - began


def _square(vector: Tensor) -> Tensor:
    """Squared length, float64; accumulated in the vector's own format."""
    return torch.dot(vector.detach(), vector.detach()).double()


def _total(parts: Sequence[Tensor]) -> float:
    return float(torch.stack(list(parts)).sum()) if parts else 0.0
