"""DiveBatch's estimate of gradient diversity: one number per epoch, and biased.

    num  += sum of |g_i|² over the batch
    vec_P += samples of the batch x mean gradient of the batch
    n Delta_hat = n num / |vec_P|²                       at the end of the epoch, n samples of it

The g_i are taken where the parameters stood when their batch came, so this is not B_S at any
parameters. For plain SGD with step size lr, unscaled, vec_P telescopes:

    vec_P = batch / lr x (parameters at the start - parameters at the end)

The denominator is how far the epoch moved, whatever the reason. Where the parameters wander around
a minimum they move little and the estimate is far too large, the more so the larger lr; where the
mean gradient shrinks in the course of the epoch it is too small for the parameters at its end.

Source: Chen, Wang, Sundaram, "DiveBatch", 2025, arXiv 2509.16173, and their released code.
Deliberate differences: a batch's mean gradient is weighted with its samples, which for equal
batches is the same and for a shorter last one the sum over samples that the definition means; no
1e-10 is added to the denominator (no movement gives inf); sums are float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpctrain.state import Placed, State


class EpochDiversity:
    """Adds up one epoch; a `Stateful`. Every method is local, every input equal on all ranks.

    Holds P float64 numbers. Once an epoch is over: `b_s()`, then `reset()`.

    Args:
        n_params: P.
        device: Where the mean gradients are.
    """

    def __init__(self, n_params: int, device: torch.device | None = None) -> None:
        self.vec_P = torch.zeros(n_params, dtype=torch.float64, device=device)
        self.sum_sq = 0.0
        self.samples = 0

    def add(self, sum_sq: float, samples: int, mean_grad_P: Tensor) -> None:
        """Take one step in.

        Args:
            sum_sq: sum_i |g_i|² over the samples of the step, at the parameters of the step.
            samples: How many, over all ranks.
            mean_grad_P: Their mean gradient, (P,), before clipping and weight decay.
        """
        self.vec_P.add_(mean_grad_P, alpha=samples)
        self.sum_sq += sum_sq
        self.samples += samples

    def b_s(self) -> float:
        """The bound n Delta_hat of what was added since the last reset; biased, see the module.

        inf where the sum of gradients is zero, NaN where nothing was added.
        """
        length_sq = float(self.vec_P @ self.vec_P)
        if length_sq == 0.0:
            return math.inf if self.sum_sq > 0.0 else math.nan
        return self.samples * self.sum_sq / length_sq

    def reset(self) -> None:
        """Begin an epoch."""
        self.vec_P.zero_()
        self.sum_sq, self.samples = 0.0, 0

    def state(self) -> State:
        return State(
            tensors={"vec_P": Placed(self.vec_P)},
            counters={"sum_sq": self.sum_sq, "samples": self.samples},
        )

    def load_state(self, state: State) -> None:
        self.vec_P.copy_(state.tensors["vec_P"].tensor)
        self.sum_sq = float(state.counters["sum_sq"] or 0.0)
        self.samples = int(state.counters["samples"] or 0)
