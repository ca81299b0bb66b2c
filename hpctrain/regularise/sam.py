"""Sharpness-aware minimisation: the gradient is taken beside the parameters, not at them.

    ascent:   e = rho * g / |g|,  g the gradient at w of this rank's share of the batch
    average:  e = rho * z / sqrt(P),  z standard normal, equal on the ranks of a replica
    w <- w - lr * (gradient at w + e)

ascent seeks parameters whose worst neighbour is good and costs a second pass; average seeks those
whose neighbours are good on average and costs only the noise. rho is the length of e (its root mean
square for average). The loss that is shown is that at w + e.

Source: Foret et al. 2021, arXiv 2010.01412, algorithm 1 with m = batch_local (ascent; every rank
its own e, as in the paper's distributed experiments); Zhu et al. 2023, arXiv 2306.02913, theorem 1:
decentralised SGD is the average form with the replicas' own covariance in place of rho^2 / P.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpctrain.models.flat import FlatModel
from hpctrain.regularise.regularisers import Regulariser
from hpctrain.regularise.table import RegulariserTable


class Sam(RegulariserTable):
    """[[regulariser]] kind = "sam"."""

    kind: Literal["sam"] = "sam"
    """Sharpness-aware minimisation."""
    form: Literal["ascent", "average"] = "ascent"
    """Step towards the worst neighbour, or a random one."""
    rho: float = Field(default=0.05, gt=0.0)
    """Length of that step."""

    adjusts_gradient: ClassVar[bool] = False

    def build(self, flat: FlatModel, replica_seed: int) -> Perturbation:
        """Local. At work on one model."""
        return Perturbation(self, flat, replica_seed)


class Perturbation(Regulariser):
    """Moves the parameters before a gradient is taken, and back. All methods are local.

    Args:
        config: How.
        flat: The model.
        replica_seed: Equal on the ranks of a replica.
    """

    def __init__(self, config: Sam, flat: FlatModel, replica_seed: int) -> None:
        self._config, self._flat = config, flat
        self._seed = replica_seed
        self._own_P: Tensor | None = None

    @torch.no_grad()
    def perturb(self, step: int, gradient: Callable[[], None]) -> None:
        """Move the parameters.

        Args:
            step: Of this rank; the noise follows from it.
            gradient: Adds this rank's gradient to the flat gradient; called by "ascent" alone,
                which leaves the flat gradient at zero.
        """
        params_P = self._flat.params_P
        self._own_P = params_P.clone()
        if self._config.form == "average":
            random = torch.Generator(params_P.device)
            random.manual_seed((self._seed * 1_000_003 + step) % 2**63)
            noise_P = torch.empty_like(params_P).normal_(generator=random)
            params_P.add_(noise_P, alpha=self._config.rho / len(params_P) ** 0.5)
            return
        with torch.enable_grad():
            gradient()
        norm = self._flat.grad_norm()
        if norm > 0.0:
            params_P.add_(self._flat.grads_P, alpha=self._config.rho / norm)
        self._flat.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Move the parameters back to where they were."""
        assert self._own_P is not None
        self._flat.params_P.copy_(self._own_P)
