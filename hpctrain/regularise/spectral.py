"""Spectral regularisation: every layer's largest singular value is drawn to one, biases to zero.

    R = sum over matrices W of (sigma(W)^k - 1)^2 + sum over biases b of |b|^(2k)
        + sum over the scales s of norm layers of (|s|^k - 1)^2
    the loss is increased by strength * R

sigma, the largest singular value, comes from one step of the power iteration per update, whose
left vector u is kept from update to update:

    v <- W'u / |W'u|,   u <- Wv / |Wv|,   sigma = u'Wv
    gradient of (sigma^k - 1)^2:  2 k (sigma^k - 1) sigma^(k-1) u v'     (u, v taken as constants)

A parameter of two or more dimensions is a matrix with its first dimension as rows: kernels and
embeddings too. A parameter of one dimension is a bias, as is the shift of a norm layer, unless it
is a norm layer's scale, each entry of which is a matrix of one by one. Where a matrix is zero, u
stays as it is, so that the iteration goes on when there is something to iterate.

The gradient of R is added once to the sum over ranks (`regularisers`), so it is neither in the loss
that is shown nor in the noise that is measured. Cost per update: three passes over the parameters,
whatever the batch; memory: a vector u per matrix.

Source: Lewandowski, Bortkiewicz, Kumar, Gyorgy, Schuurmans, Ostaszewski, Machado 2024, "Learning
continually by spectral regularization", arXiv 2406.06811, section 4, where k = 2. Taking each entry
of a scale as a layer of its own is the reading here of "multiplicative parameters to one". u starts
at a fixed random direction.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hpctrain.errors import ConfigError
from hpctrain.models.flat import FlatModel
from hpctrain.regularise.regularisers import Regulariser
from hpctrain.regularise.table import RegulariserTable
from hpctrain.state import Placed, State


class Spectral(RegulariserTable):
    """[[regulariser]] kind = "spectral"."""

    kind: Literal["spectral"] = "spectral"
    """Draw each layer's largest singular value to one, so that later tasks can still be learned."""
    strength: float = Field(default=1e-3, gt=0.0)
    """What R is multiplied by in the loss."""
    power: int = Field(default=2, ge=1)
    """k: the larger, the steeper beyond one and the flatter near zero."""

    adjusts_gradient: ClassVar[bool] = True

    def build(self, flat: FlatModel, replica_seed: int) -> SpectralPenalty:
        """Local. At work on one model; `replica_seed` is not used."""
        return SpectralPenalty(self, flat)


class SpectralPenalty(Regulariser):
    """Adds the gradient of strength * R. All methods are local.

    Args:
        config: How.
        flat: The model; its modules say which parameters are scales of norm layers.
    """

    def __init__(self, config: Spectral, flat: FlatModel) -> None:
        self._config, self._flat = config, flat
        self._u = {
            name: _direction(place, len(view))
            for place, (name, view) in enumerate(self._named(flat.params_P))
            if view.ndim >= 2
        }
        self._u = {name: u.to(flat.params_P) for name, u in self._u.items()}
        self._scales = {name for name in flat.names if _is_scale(flat.module, name)}
        self._told: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def adjust_gradient(self, step: int, samples: int) -> None:
        """Add the gradient; one step of every power iteration."""
        k, strength = self._config.power, self._config.strength
        total = largest = self._flat.params_P.new_zeros(())
        gradients = self._flat.views(self._flat.grads_P)
        for (name, w), g in zip(self._named(self._flat.params_P), gradients, strict=True):
            if name in self._u:
                sigma, v = iterate(w.flatten(1), self._u[name])
                value, slope = pull_to_one(sigma, k)
                g.flatten(1).addr_(self._u[name] * (strength * slope), v)
                largest = torch.maximum(largest, sigma)
            elif name in self._scales:
                values, slopes = pull_to_one(w.abs(), k)
                value = values.sum()
                g.add_(slopes * w.sign(), alpha=strength)
            else:
                square = w.square().sum()
                value = square**k
                g.add_(w * (2 * k * square ** (k - 1)), alpha=strength)
            total = total + value
        self._told = (strength * total, largest)

    def tally(self) -> dict[str, float]:
        """The added loss, strength * R, and the largest singular value of all matrices."""
        if self._told is None:
            return {}
        penalty, largest = self._told
        return {"penalty": float(penalty), "sigma_max": float(largest)}

    def state(self) -> State:
        """The vector u of every matrix, equal on all ranks of a replica."""
        return State({f"u.{name}": Placed(u) for name, u in self._u.items()})

    def load_state(self, state: State) -> None:
        """Take the vectors back.

        Raises:
            ConfigError: they are of other matrices.
        """
        if {f"u.{name}" for name in self._u} != state.tensors.keys():
            raise ConfigError(
                "the checkpoint has no state of the spectral regulariser for this model's "
                f"{len(self._u)} matrices (it has {len(state.tensors)}). Resume with the "
                "[[regulariser]] and [model] tables the run was started with"
            )
        for name, u in self._u.items():
            u.copy_(state.tensors[f"u.{name}"].tensor)

    def _named(self, vector_P: Tensor) -> list[tuple[str, Tensor]]:
        return list(zip(self._flat.names, self._flat.views(vector_P), strict=True))


def iterate(w_RC: Tensor, u_R: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the power iteration. Local. Overwrites `u_R`, but not where sigma is 0.

    Returns:
        sigma, never more than the largest singular value, and v (C,).
    """
    tiny = torch.finfo(w_RC.dtype).tiny
    v_C = w_RC.T @ u_R
    v_C = v_C / torch.linalg.vector_norm(v_C).clamp_min(tiny)
    image_R = w_RC @ v_C
    sigma = torch.linalg.vector_norm(image_R)
    u_R.copy_(torch.where(sigma > 0.0, image_R / sigma.clamp_min(tiny), u_R))
    return sigma, v_C


def pull_to_one(size: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(size^k - 1)^2 and its derivative by size, entry by entry; size >= 0. Local, pure."""
    apart = size.pow(k) - 1.0
    return apart.square(), apart * size.pow(k - 1) * (2 * k)


_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def _is_scale(module: nn.Module, name: str) -> bool:
    """Whether the parameter of that name multiplies entry by entry what a norm layer gives."""
    owner, _, own_name = name.rpartition(".")
    return own_name == "weight" and isinstance(module.get_submodule(owner), _NORMS)


def _direction(place: int, n: int) -> Tensor:
    """(n,) float64 of length one, the same at every start."""
    random = torch.Generator().manual_seed(place)
    return F.normalize(torch.randn(n, generator=random, dtype=torch.float64), dim=0)
