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

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from hpctrain.errors import ConfigError
from hpctrain.exchange.buckets import Bucket, make_buckets
from hpctrain.exchange.ready import ReadyBuckets
from hpctrain.exchange.setting import Setting
from hpctrain.exchange.table import ExchangeTable
from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import OptimiserConfig
from hpctrain.settings import Train
from hpctrain.state import State
from hpctrain.transport.communicator import DenseReducer


class Dense(ExchangeTable):
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

    gives: ClassVar[Literal["gradient"]] = "gradient"
    exact: ClassVar[bool] = True

    def comes_last(self, shape: torch.Size) -> bool:
        """No parameter is treated apart. Local."""
        return False

    def require_fit(self, train: Train, optimiser: OptimiserConfig) -> None:
        """Check the tables [train] and [optimiser] against this one. Local.

        Raises:
            ValueError: with what is allowed.
        """
        if train.dtype == "float64" and self.wire_dtype != "native":
            raise ValueError(
                f'exchange.wire_dtype = "{self.wire_dtype}" would round train.dtype = "float64"; '
                'use "native"'
            )
        if self.dense_backend == "horovod" and self.scope != "world":
            raise ValueError(
                f'exchange.scope = "{self.scope}" sums over some of the ranks and Horovod over all '
                'of them; set exchange.dense_backend = "mpi"'
            )
        if self.dense_backend == "nccl" and train.device == "cpu":
            raise ValueError(
                'exchange.dense_backend = "nccl" moves GPU memory, but train.device = "cpu"; '
                'use dense_backend = "horovod" or "mpi"'
            )

    def build(self, setting: Setting) -> DenseExchange:
        """Collective. The running exchange."""
        buckets = buckets_of(self, setting.flat)
        names = [bucket.name for bucket in buckets]
        return DenseExchange(setting.flat, buckets, setting.make_reducer(self, names))


class DenseExchange:
    """Runs the dense exchange of one model. Collective wherever the reducer is.

    Args:
        flat: The model; its flat gradient is reduced in place.
        buckets: From `buckets_of`.
        reducer: Sums buckets over ranks; None on a single rank, where there is nothing to sum.
    """

    gives: Literal["gradient", "update"] = "gradient"
    ready = True

    def __init__(
        self, flat: FlatModel, buckets: list[Bucket], reducer: DenseReducer | None
    ) -> None:
        self._reducer = reducer
        self._views = [flat.grads_P[bucket.start : bucket.stop] for bucket in buckets]
        self._ready = ReadyBuckets(flat, buckets, self._start)
        self.bucket_names = [bucket.name for bucket in buckets]
        self.algorithm = f"{reducer.name}: {reducer.algorithm}" if reducer else "none: one rank"

    @property
    def current(self) -> int:
        """The bucket that is being waited for, -1 when none."""
        return self._reducer.current if self._reducer else -1

    def arm(self, lr: float = 1.0) -> None:
        """Say that the next backward pass is the step's last. Local; `lr` is not used."""
        self._ready.arm()

    def disarm(self) -> None:
        """Take `arm` back: the next backward pass only adds to the gradient. Local."""
        self._ready.disarm()

    def finish(self) -> bool:
        """Collective. Wait for the sum; start buckets that backward did not complete."""
        self._ready.finish()
        if self._reducer is not None:
            self._reducer.finish()
        return True

    def settle(self, *, keep: bool) -> None:
        """Nothing to keep or to take back. Local."""

    def tally(self) -> dict[str, float]:
        """Nothing beside the ledger's bytes and seconds. Local."""
        return {}

    def close(self) -> None:
        """Collective. Remove the hooks and end the reducer's threads."""
        self._ready.close()
        if self._reducer is not None:
            self._reducer.close()

    def state(self) -> State:
        """Dense exchange remembers nothing between steps."""
        return State()

    def load_state(self, state: State) -> None:
        """Nothing to take back. Local.

        Raises:
            ConfigError: the checkpoint is of an exchange that remembers something.
        """
        if state.tensors:
            raise ConfigError(
                "the checkpoint is of another exchange, and a dense one would lose what it holds "
                f"({', '.join(sorted(state.tensors)[:3])}). Resume with the [exchange] table the "
                "run was started with"
            )

    def _start(self, index: int) -> None:
        if self._reducer is not None:
            self._reducer.start(index, self._views[index])


def buckets_of(config: Dense, flat: FlatModel) -> list[Bucket]:
    """The model's buckets under these settings, equal on all ranks. Local."""
    sizes: Sequence[int] = [s.stop - s.start for s in flat.slices]
    itemsize = flat.grads_P.element_size()
    return make_buckets(flat.names, sizes, itemsize, int(config.bucket_mib * 2**20))
