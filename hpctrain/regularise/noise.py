"""Gradient noise: what Yin et al. call a diversity-inducing mechanism, and Langevin dynamics.

    g_B <- g_B + sqrt(V_t / (P n)) z        z standard normal in P dimensions
    V_t  = variance / (1 + t)^decay

per = "sample": n is the number of samples in g_B, their mean gradient. That is the same in
distribution as noise of mean squared length V_t added to each sample's gradient for itself, since
a mean of n independent normal vectors is one normal vector of an n-th of the variance. Gradient
diversity, sum |g_i|^2 / |sum g_i|^2 over n samples, becomes in expectation of both terms

    (sum |g_i|^2 + n V) / (|sum g_i|^2 + n V)

which tends to one as V grows: the batch may be larger before it stops paying off, because there
is more noise to average out. per = "step": n is 1, noise of its own whatever the batch.

z follows from seed, replica and step alone, so it is equal on the ranks of a replica, costs no
message and needs no state. It is added after the gradient has been measured and summed
(`regularisers`): B_S in the record is that of the data, and no batch policy answers to noise that
the run itself adds. Cost per update: P normal numbers.

Source: Yin et al. 2018, arXiv 1706.05699, on diversity-inducing mechanisms (per = "sample"; there
the step is along the sum over samples, here along the mean). Welling, Teh 2011, stochastic gradient
Langevin dynamics: with lr fixed and no momentum, per = "step" and variance = 2 T P / lr samples at
temperature T; here the noise does not follow the schedule of lr. Neelakantan et al. 2015, arXiv
1511.06807: per = "step", decay = 0.55, variance = eta P.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from hpctrain.models.flat import FlatModel
from hpctrain.regularise.regularisers import Regulariser
from hpctrain.regularise.table import RegulariserTable

_STREAM = 0x6E6F697365
"""Keeps these numbers apart from others that follow from the same seed and step."""


class Noise(RegulariserTable):
    """[[regulariser]] kind = "noise"."""

    kind: Literal["noise"] = "noise"
    """Add normal noise to the gradient."""
    variance: float = Field(gt=0.0)
    """V, the mean squared length of the noise: in the units of a squared gradient, to be compared
    with the squared length of a sample's gradient."""
    per: Literal["sample", "step"] = "sample"
    """Noise of every sample's gradient, which a batch averages out, or of the step's."""
    decay: float = Field(default=0.0, ge=0.0)
    """The variance falls with the steps to this power; 0 keeps it."""

    adjusts_gradient: ClassVar[bool] = True

    def build(self, flat: FlatModel, replica_seed: int) -> GradientNoise:
        """Local. At work on one model."""
        return GradientNoise(self, flat, replica_seed)


class GradientNoise(Regulariser):
    """Adds the noise. All methods are local.

    Args:
        config: How.
        flat: The model.
        replica_seed: Equal on the ranks of a replica.
    """

    def __init__(self, config: Noise, flat: FlatModel, replica_seed: int) -> None:
        self._config, self._flat = config, flat
        self._seed = replica_seed
        self._told: float | None = None

    @torch.no_grad()
    def adjust_gradient(self, step: int, samples: int) -> None:
        """Add this step's noise."""
        config, grads_P = self._config, self._flat.grads_P
        variance = config.variance / (1.0 + step) ** config.decay
        self._told = variance / (samples if config.per == "sample" else 1)
        random = torch.Generator(grads_P.device)
        sequence = np.random.SeedSequence((_STREAM, self._seed, step))
        random.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        noise_P = torch.empty_like(grads_P).normal_(generator=random)
        grads_P.add_(noise_P, alpha=(self._told / len(grads_P)) ** 0.5)

    def tally(self) -> dict[str, float]:
        """Mean squared length of the noise in the step's gradient."""
        return {} if self._told is None else {"variance": self._told}
