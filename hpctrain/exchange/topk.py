"""Top-k exchange: each step sends the largest accumulated entries, the rest waits in a residual.

    acc_m  <- residual_m + lr * d_m      (d_m: the local update direction of node m)
    sent_m  = the density * n entries of acc_m of largest magnitude, per bucket
    residual_m <- acc_m - sent_m
    w <- w - sum over nodes of sent_m

The gradients of a node's ranks are added first, in memory that they share, and each of them works
on its shard of the sum. Parameters of one dimension and small ones are summed whole. Details:
`compress.feedback` (residual, momentum, decay, clipping), `gather`, `exclusive` and `owner` (what
travels), `whole` (dense sums), `compress.wire` (coding).

Source: Alistarh et al. 2018 (arXiv 1809.10505, Algorithm 1). Dense sums inside nodes and sparse
exchange between them were proposed for GPUs by Shi et al. 2021 (HiTopKComm, arXiv 2010.10458).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator

from hpctrain.compress.scan import Kernel
from hpctrain.compress.wire import Coding
from hpctrain.exchange.setting import Setting
from hpctrain.exchange.switch import Switch
from hpctrain.exchange.table import ExchangeTable
from hpctrain.exchange.topk_exchange import TopkExchange
from hpctrain.exchange.tuned import FIRST_STAGE, Tuned
from hpctrain.optimiser import OptimiserConfig
from hpctrain.settings import Train
from hpctrain.transport.communicator import Communicator


class TopkSettings(ExchangeTable):
    """What `topk` and `auto` have in common."""

    density: float = Field(default=0.01, gt=0.0, le=1.0)
    """Fraction of the entries of each bucket that each node sends per step."""
    warmup_steps: int = Field(default=0, ge=0)
    """So many steps lead from 25 % down to `density`, by a factor of 4 per stage; stages that would
    send as much as a dense sum are dense."""
    tune: Tuned | None = None
    """Choose the density at every step by the most descent per cost; `density` holds at first."""
    algorithm: Literal["auto", "gather", "exclusive", "owner"] = "auto"
    """What travels: everybody's entries to all (gather), values at positions that one node picks
    (exclusive), entries to the owner of their part and sums back (owner). auto: gather for two
    nodes, else owner."""
    index: Literal["uint32", "block16"] = "block16"
    """Coding of positions, 4 or 2 bytes each."""
    values: Literal["float32", "float16", "bfloat16", "sign"] = "float16"
    """Coding of values; the rounding error stays in the residual."""
    gives: Literal["update", "gradient"] = "update"
    """update: momentum, decay and clipping of [optimiser] (sgd) come before selection, lr
    multiplies the fresh gradient, and the result is subtracted from the parameters. gradient: the
    selected gradient entries go to any optimiser."""
    feedback: bool = True
    """Keep what was not sent for later steps."""
    masking: bool = True
    """Set the velocity of sent entries to zero, as Deep Gradient Compression does, where there is a
    velocity: with gives = "update" and momentum. What is summed whole keeps its velocity."""
    hierarchy: bool = True
    """Sum over the ranks of a node first; false, and for gradients on GPUs: every rank sends its
    own entries."""
    xi_every: int = Field(default=0, ge=0)
    """Measure the convergence assumption of Alistarh et al. every so many steps; 0 = never."""
    kernel: Kernel = "auto"
    """What compares and collects on CPUs, to the same result: NumPy, or code that numba compiles at
    the start, several times faster; "auto": numba where it is installed."""
    dense_below: int = Field(default=16384, ge=0)
    """Parameters with fewer entries, and those of one dimension, are summed whole."""
    bucket_mib: float = Field(default=16.0, gt=0.0)
    """Largest bucket in MiB: small ones start earlier, large ones cost fewer messages."""

    @model_validator(mode="after")
    def _what_goes_together(self) -> TopkSettings:
        if self.warmup_steps and self.density >= FIRST_STAGE:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} leads down from {FIRST_STAGE:.0%} and density "
                f"is {self.density:g}; set warmup_steps = 0"
            )
        if not self.feedback and self.values != "float32":
            raise ValueError(
                f'values = "{self.values}" rounds, and without feedback the error is lost; set '
                'values = "float32" or feedback = true'
            )
        return self

    def count(self, n: int, density: float) -> int:
        """Entries that a shard of n sends per step at that density. Local."""
        # 0.07 * 100 is a little more than 7.
        return min(n, math.ceil(round(density * n, 6)))

    def comes_last(self, shape: torch.Size) -> bool:
        """Whether a parameter is summed whole. Local."""
        return len(shape) < 2 or shape.numel() < self.dense_below

    def require_fit(self, train: Train, optimiser: OptimiserConfig) -> None:
        """Check the tables [train] and [optimiser] against this one. Local.

        Raises:
            ValueError: with what is allowed.
        """
        if train.dtype != "float32":
            raise ValueError(
                f"this exchange sends float32 gradients, but train.dtype = "
                f'"{train.dtype}"; use "float32", or exchange.kind = "dense"'
            )
        if self.gives == "update" and optimiser.kind != "sgd":
            raise ValueError(
                f'exchange.gives = "update" needs optimiser.kind = "sgd", whose momentum can come '
                f'before selection; got "{optimiser.kind}": set exchange.gives = "gradient"'
            )
        if self.gives == "update" and optimiser.half_life_batch is not None:
            raise ValueError(
                'optimiser.half_life_batch does not reach the momentum of exchange.gives = "update"'
                '; drop it, or set exchange.gives = "gradient"'
            )

    @property
    def coding(self) -> Coding:
        """How entries travel."""
        return Coding(self.index, self.values)

    def make_switch(self, n_buckets: int, comm: Communicator) -> Switch | None:
        """What chooses between sparse and dense, bucket by bucket; None: always sparse. Local."""
        return None

    def build(self, setting: Setting) -> TopkExchange:
        """Collective. The running exchange."""
        return TopkExchange(self, setting)


class Topk(TopkSettings):
    """[exchange] kind = "topk": the largest entries with error feedback."""

    kind: Literal["topk"] = "topk"
    """Send the largest accumulated entries."""
