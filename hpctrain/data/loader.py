"""Batches made ahead of time by one background thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hpctrain.data.order import Position, SampleOrder, Step
from hpctrain.data.spec import Samples
from hpctrain.state import State

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MicroBatches:
    """A rank's share of a step, a part at a time. Iterating is local.

    On a GPU the share stays in pinned host memory, and the copy of a part starts one part ahead:
    what lies on the device does not grow with the share.
    """

    inputs: Tensor
    """(B, ...) of all parts."""
    targets: Tensor
    """(B, ...)."""
    size: int
    """Most samples of a part."""
    device: torch.device | None = None
    """Where the parts go; None = where they are."""

    def __len__(self) -> int:
        return -(-len(self.targets) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = zip(self.inputs.split(self.size), self.targets.split(self.size), strict=True)
        if self.device is None:
            yield from parts
            return
        ahead: deque[tuple[Tensor, Tensor]] = deque()
        for inputs, targets in parts:
            ahead.append(
                (
                    inputs.to(self.device, non_blocking=True),
                    targets.to(self.device, non_blocking=True),
                )
            )
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead

    def halved(self) -> MicroBatches:
        """The same samples in two parts. Local."""
        return replace(self, size=-(-len(self.targets) // 2))


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step, cut into micro-batches."""

    epoch: int
    batch_global: int
    """True number of samples over all ranks."""
    batch_replica: int
    """The same over the ranks of this rank's replica; may be 0."""
    batch_local: int
    """Samples on this rank; may be 0."""
    micro_batches: MicroBatches | tuple[()]
    """(inputs, targets) of at most micro_batch samples each; empty when batch_local is 0."""
    starts_epoch: bool


class Loader:
    """Serves the steps of an order as tensors. Every method is local.

    It predicts that the next steps ask for the same batch_global; if they do not, what was made
    ahead is thrown away and no sample is skipped. The thread touches neither the communicator nor a
    global random generator.

    Args:
        samples: the training set.
        order: the sample order; the loader moves it.
        micro_batch: most samples in one micro-batch; None = all of the rank's share.
        prefetch: batches to make ahead; 0 = none, and no thread.
        device: where tensors go. For CUDA the thread pins them.
    """

    def __init__(
        self,
        samples: Samples,
        order: SampleOrder,
        micro_batch: int | None = None,
        prefetch: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._samples, self._order, self._micro_batch = samples, order, micro_batch
        self._depth = prefetch
        self._device = device if device is not None and device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "hpctrain-loader") if prefetch else None
        self._ahead: deque[tuple[Step, Future[Batch]]] = deque()

    @property
    def samples_seen(self) -> int:
        """Samples served since the start, over all ranks and epochs."""
        return self._order.samples_seen

    def next(self, batch_global: int, samples_left: int | None = None) -> Batch:
        """This rank's share of the next step. Blocks only as long as the batch is not ready.

        Args:
            batch_global: Samples to take over all ranks; fewer come at the end of an epoch.
            samples_left: Take no more than these, over all ranks.

        Raises:
            ConfigError: batch_global or samples_left is below 1.
            Exception: whatever reading the samples raised, unchanged; the order has not moved.
        """
        step = self._order.plan(self._order.position, batch_global, samples_left)
        if self._thread is None:
            batch = self._make(step)
        else:
            if not self._ahead or self._ahead[0][0] != step:
                self._discard()
                self._ahead.append((step, self._thread.submit(self._make, step)))
            self._predict(batch_global, samples_left)
            batch = self._ahead.popleft()[1].result()
        self._order.position = step.after
        return batch

    def state(self) -> State:
        """The order as served so far, not as made ahead. Local."""
        return self._order.state()

    def load_state(self, state: State) -> None:
        """Go to where another run's order stood. Local.

        Raises:
            ConfigError: as `SampleOrder.load_state`.
        """
        self._discard()
        self._order.load_state(state)

    def close(self) -> None:
        """Join the thread. May be called twice."""
        self._discard()
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _predict(self, batch_global: int, samples_left: int | None) -> None:
        """Have the thread make the steps after those under way, as many as `prefetch`."""
        assert self._thread is not None
        for step, _ in self._ahead:
            if samples_left is not None:
                samples_left -= step.batch_global
        while len(self._ahead) <= self._depth and (samples_left is None or samples_left > 0):
            at: Position = self._ahead[-1][0].after
            step = self._order.plan(at, batch_global, samples_left)
            self._ahead.append((step, self._thread.submit(self._make, step)))
            if samples_left is not None:
                samples_left -= step.batch_global

    def _discard(self) -> None:
        for _, future in self._ahead:
            future.cancel()  # one that already runs ends by itself before the next one starts
        self._ahead.clear()

    def _make(self, step: Step) -> Batch:
        mine = self._order.slice(step)
        count = len(mine.indices)
        micro_batches: MicroBatches | tuple[()] = ()
        if count:
            inputs, targets = self._samples.batch(mine.indices, mine.epoch)
            if self._device is not None:
                inputs, targets = inputs.pin_memory(), targets.pin_memory()
            size = min(self._micro_batch or count, count)
            micro_batches = MicroBatches(inputs, targets, size, self._device)
        return Batch(
            mine.epoch,
            mine.batch_global,
            mine.batch_replica,
            count,
            micro_batches,
            mine.starts_epoch,
        )
