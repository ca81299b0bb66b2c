"""What is made of the average of a round: it is taken as it is, or as a step of an outer optimiser.

    delta = x_start - mean       (x_start: where all replicas began the round)
    none:      x <- mean
    slowmo:    u <- momentum * u + delta / lr_inner;   x <- x_start - lr * lr_inner * u
    nesterov:  u <- momentum * u + delta;              x <- x_start - lr * (delta + momentum * u)

SlowMo keeps u free of the inner step size; with lr = 1 and momentum = 0 both are plain averaging.

Source: Wang et al. 2019, arXiv 1910.00643, algorithm 1 (SlowMo; the inner optimiser's memory is
`momentum` of the rule); Douillard et al. 2023, arXiv 2311.08105, algorithm 1 (DiLoCo: nesterov with
lr = 0.7 and momentum = 0.9 above an inner AdamW).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor

from hpctrain.table import Table


class Outer(Protocol):
    """An outer optimiser's update rule."""

    lr: float
    momentum: float

    def step(self, start_P: Tensor, mean_P: Tensor, slow_P: Tensor, lr_inner: float) -> None:
        """Where the next round starts. Local; every replica computes the same.

        Args:
            start_P: (P,) where the round began; overwritten with where the next one begins.
            mean_P: (P,) the average at its end; overwritten with the same.
            slow_P: (P,) the outer memory; overwritten.
            lr_inner: Step size of the round's last inner step.
        """
        ...


class SlowMo(Table):
    """[sync.outer] kind = "slowmo": slow momentum."""

    kind: Literal["slowmo"] = "slowmo"
    """The outer optimiser."""
    lr: float = Field(default=1.0, gt=0.0)
    """The slow learning rate."""
    momentum: float = Field(default=0.5, ge=0.0, lt=1.0)
    """The slow momentum; the authors of fairscale's SlowMo use 0 below 4 replicas, 0.2 at 4, 0.5 at
    8 and 0.6 at 16."""

    def step(self, start_P: Tensor, mean_P: Tensor, slow_P: Tensor, lr_inner: float) -> None:
        """As `Outer.step`."""
        delta_P = torch.sub(start_P, mean_P, out=mean_P)
        slow_P.mul_(self.momentum).add_(delta_P, alpha=1.0 / lr_inner)
        start_P.sub_(slow_P, alpha=self.lr * lr_inner)
        mean_P.copy_(start_P)


class Nesterov(Table):
    """[sync.outer] kind = "nesterov": Nesterov momentum, as DiLoCo has it."""

    kind: Literal["nesterov"] = "nesterov"
    """The outer optimiser."""
    lr: float = Field(default=0.7, gt=0.0)
    """The outer learning rate."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """The outer momentum."""

    def step(self, start_P: Tensor, mean_P: Tensor, slow_P: Tensor, lr_inner: float) -> None:
        """As `Outer.step`; `lr_inner` is not used."""
        delta_P = torch.sub(start_P, mean_P, out=mean_P)
        slow_P.mul_(self.momentum).add_(delta_P)
        start_P.sub_(delta_P.add_(slow_P, alpha=self.momentum), alpha=self.lr)
        mean_P.copy_(start_P)


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


OuterConfig = Annotated[
    Annotated[SlowMo, Tag("slowmo")] | Annotated[Nesterov, Tag("nesterov")], Discriminator(_kind)
]
"""The table [sync.outer]."""
