"""Dense exchange: the gradient is summed over all ranks, bucket by bucket, during backward.

    grad <- sum over ranks of grad_r        (grad_r already divided by the global sample count)

The sum is a ring all-reduce (Horovod, MPI or NCCL underneath): each rank sends 2(P-1)/P times the
gradient per step. Buckets start in index order, never in the order in which gradients happen to be
ready, so every rank makes the same sequence of collective calls and the sums are bitwise
reproducible; a bucket whose parameters got no gradient (unused parameter, rank without samples)
starts in `finish` with zeros. Extra memory: none beyond the reducer's wire buffers.

Source: Sergeev and Del Balso 2018 (arXiv 1802.05799) for the Horovod ring; the overlap of backward
and communication by fixed buckets follows Li et al. 2020 (arXiv 2006.15704, section 3.2), with two
differences: buckets are never rebuilt, and they start in index order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from hpctrain.exchange.buckets import Bucket, make_buckets
from hpctrain.models.flat import FlatModel
from hpctrain.state import State
from hpctrain.table import Table
from hpctrain.transport.communicator import DenseReducer


class Dense(Table):
    """Settings of the dense exchange."""

    kind: Literal["dense"] = "dense"
    """Sum the whole gradient over all ranks at every step."""
    dense_backend: Literal["horovod", "mpi", "nccl"] = "horovod"
    """What carries the buckets: Horovod's background thread, mpi4py, or NCCL between GPUs."""
    wire_dtype: Literal["native", "float32", "float16", "bfloat16"] = "native"
    """Number format on the network; native is the gradient's own (float32, or float64 with
    train.dtype = "float64"). Half formats halve the bytes and round once in each direction."""
    bucket_mib: float = 4.0
    """Largest bucket in MiB: small ones start earlier, large ones use the network better."""


class DenseExchange:
    """Runs the dense exchange of one model. Collective wherever the reducer is.

    Args:
        flat: The model; its flat gradient is reduced in place.
        buckets: From `buckets_of`.
        reducer: Sums buckets over ranks; None on a single rank, where there is nothing to sum.
    """

    gives: Literal["gradient", "update"] = "gradient"

    def __init__(
        self, flat: FlatModel, buckets: list[Bucket], reducer: DenseReducer | None
    ) -> None:
        self._flat = flat
        self._reducer = reducer
        self._buckets = buckets
        self._views = [flat.grads_P[bucket.start : bucket.stop] for bucket in buckets]
        self._armed = False
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
        """Say that the next backward pass is the step's last. Local."""
        self._armed = True
        self._next = 0
        self._missing = [len(bucket.parameters) for bucket in self._buckets]

    def disarm(self) -> None:
        """Take `arm` back: the next backward pass only adds to the gradient. Local."""
        self._armed = False

    def finish(self) -> None:
        """Collective. Wait for the sum; start buckets that backward did not complete."""
        if not self._armed:
            self.arm()
        self._armed = False
        self._start_through(len(self._buckets))
        if self._reducer is not None:
            self._reducer.finish()

    def close(self) -> None:
        """Collective. Remove the hooks and end the reducer's threads."""
        for hook in self._hooks:
            hook.remove()
        if self._reducer is not None:
            self._reducer.close()

    def state(self) -> State:
        """Dense exchange remembers nothing between steps."""
        return State()

    def load_state(self, state: State) -> None:
        """Nothing to take back."""

    def _make_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def on_gradient(parameter: torch.Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            if not self._flat.owns_gradient(parameter):
                self._flat.adopt_gradient(parameter)
            if not self._armed:
                return
            self._missing[index] -= 1
            ready = self._next
            while ready < len(self._buckets) and self._missing[ready] <= 0:
                ready += 1
            self._start_through(ready)

        return on_gradient

    def _start_through(self, end: int) -> None:
        while self._next < end:
            if self._reducer is not None:
                self._reducer.start(self._next, self._views[self._next])
            self._next += 1


def buckets_of(config: Dense, flat: FlatModel) -> list[Bucket]:
    """The model's buckets under these settings, equal on all ranks. Local."""
    sizes: Sequence[int] = [s.stop - s.start for s in flat.slices]
    itemsize = flat.grads_P.element_size()
    return make_buckets(flat.names, sizes, itemsize, int(config.bucket_mib * 2**20))
