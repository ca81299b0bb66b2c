"""Wasserstein regularisation: a layer's values keep the distribution that they started with.

    R = sum over parameters of W2^2,   W2^2 = 1/d * sum over i of (w_(i) - w0_(i))^2
    the loss is increased by strength * R

w_(i) is the i-th smallest of a parameter's d values and w0_(i) that of its initial values: the
squared 2-Wasserstein distance of two empirical distributions of equally many points on a line is
that of their sorted values. The gradient by the value that stands at place i of the order is
2/d (w_(i) - w0_(i)). Any permutation of the initial values is free, so it holds a network less
than a pull to the initial values themselves; a parameter that starts constant, a norm's scale for
one, is drawn to that constant. Because of 1/d, a strength of d pulls as an l2 term of one does.

The gradient of R is added once to the sum over ranks (`regularisers`), so it is neither in the loss
that is shown nor in the noise that is measured. Cost per update: a sort of every parameter,
O(P log P) whatever the batch; memory: one copy of the parameters, in checkpoints too.

Source: Lewandowski, Kumar, Schuurmans, Gyorgy, Machado 2024, arXiv 2406.06811 version 1, section 4
(version 2 leaves it out). Weights and biases are sorted apart, each parameter by itself. Where a
run starts from the parameters of another, these are the initial values.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hpctrain.errors import ConfigError
from hpctrain.models.flat import FlatModel
from hpctrain.regularise.regularisers import Regulariser
from hpctrain.regularise.table import RegulariserTable
from hpctrain.state import Placed, State


class Wasserstein(RegulariserTable):
    """[[regulariser]] kind = "wasserstein"."""

    kind: Literal["wasserstein"] = "wasserstein"
    """Hold each parameter's values to their initial distribution."""
    strength: float = Field(default=1.0, gt=0.0)
    """What R is multiplied by in the loss."""

    adjusts_gradient: ClassVar[bool] = True

    def build(self, flat: FlatModel, replica_seed: int) -> WassersteinPenalty:
        """Local. At work on one model, now at its initial values; `replica_seed` is not used."""
        return WassersteinPenalty(self, flat)


class WassersteinPenalty(Regulariser):
    """Adds the gradient of strength * R. All methods are local.

    Args:
        config: How.
        flat: The model at its initial parameters.
    """

    def __init__(self, config: Wasserstein, flat: FlatModel) -> None:
        self._config, self._flat = config, flat
        self._initial_P = torch.cat([flat.params_P[where].sort().values for where in flat.slices])
        self._told: Tensor | None = None

    @torch.no_grad()
    def adjust_gradient(self, step: int, samples: int) -> None:
        """Add the gradient."""
        strength = self._config.strength
        total = self._flat.params_P.new_zeros(())
        for where in self._flat.slices:
            values_D = self._flat.params_P[where]
            order_D = ascending(values_D)
            apart_D = values_D[order_D] - self._initial_P[where]
            total = total + apart_D.square().mean()
            self._flat.grads_P[where].index_add_(
                0, order_D, apart_D, alpha=2.0 * strength / len(apart_D)
            )
        self._told = strength * total

    def tally(self) -> dict[str, float]:
        """The added loss, strength * R, before the update."""
        return {} if self._told is None else {"penalty": float(self._told)}

    def state(self) -> State:
        """The initial values, each parameter's in ascending order; equal on all ranks."""
        pairs = zip(self._flat.names, self._flat.slices, strict=True)
        return State({f"sorted.{name}": Placed(self._initial_P[where]) for name, where in pairs})

    def load_state(self, state: State) -> None:
        """Take the values back.

        Raises:
            ConfigError: they are of another model.
        """
        own = self.state().tensors
        if own.keys() != state.tensors.keys():
            raise ConfigError(
                "the checkpoint does not have the initial values of this model's parameters that "
                "the wasserstein regulariser compares with. Resume with the [[regulariser]] and "
                "[model] tables the run was started with"
            )
        for name, placed in own.items():
            placed.tensor.copy_(state.tensors[name].tensor)


def ascending(values_D: Tensor) -> Tensor:
    """(D,) int64, the order of the values. Local, pure."""
    if values_D.device.type == "cpu":  # NumPy's sort is vectorised, five times as fast as torch's.
        return torch.from_numpy(np.argsort(values_D.numpy()))
    return values_D.argsort(stable=True)
