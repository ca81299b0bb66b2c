"""Tells which gradient buckets backward has finished, in index order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from hpctrain.exchange.buckets import Bucket
from hpctrain.models.flat import FlatModel


class ReadyBuckets:
    """Calls `start(index)` for every bucket once per step, in index order, as early as it can.

    A bucket is ready when each of its parameters has its gradient. Buckets start in index order,
    never in the order in which gradients happen to be ready, so every rank makes the same sequence
    of collective calls; a bucket whose parameters got no gradient (unused parameter, rank without
    samples) starts in `finish`. Every method is local; `start` may be collective.

    Args:
        flat: The model; hooks on its parameters watch the backward pass.
        buckets: All parameters, each in one bucket.
        start: Begins the exchange of one bucket.
    """

    def __init__(
        self, flat: FlatModel, buckets: Sequence[Bucket], start: Callable[[int], None]
    ) -> None:
        self._flat = flat
        self._buckets = buckets
        self._start = start
        self.armed = False
        """Whether the next backward pass is the step's last."""
        self._next = 0
        self._missing = [0] * len(buckets)
        self._hooks = [
            flat.parameters[position].register_post_accumulate_grad_hook(
                self._make_hook(bucket.index)
            )
            for bucket in buckets
            for position in bucket.parameters
        ]

    def arm(self) -> None:
        """The next backward pass is the step's last."""
        self.armed = True
        self._next = 0
        self._missing = [len(bucket.parameters) for bucket in self._buckets]

    def disarm(self) -> None:
        """Take `arm` back: the next backward pass only adds to the gradient."""
        self.armed = False

    def finish(self) -> None:
        """Start the buckets that backward did not complete."""
        if not self.armed:
            self.arm()
        self.armed = False
        self._start_through(len(self._buckets))

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _make_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def on_gradient(parameter: torch.Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            if not self._flat.owns_gradient(parameter):
                self._flat.adopt_gradient(parameter)
            if not self.armed:
                return
            self._missing[index] -= 1
            ready = self._next
            while ready < len(self._buckets) and self._missing[ready] <= 0:
                ready += 1
            self._start_through(ready)

        return on_gradient

    def _start_through(self, end: int) -> None:
        while self._next < end:
            if self._flat.on_ready is not None:
                bucket = self._buckets[self._next]
                self._flat.on_ready(bucket.start, bucket.stop)
            self._start(self._next)
            self._next += 1
