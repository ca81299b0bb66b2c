"""What exchanges that compress have in common: parts of the flat gradient, and what fits them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hpctrain.errors import ConfigError
from hpctrain.models.flat import FlatModel
from hpctrain.state import State


class Parts:
    """Some pieces of a flat vector, one behind the other. Every method is local.

    Args:
        slices: The pieces, ascending; neighbours are joined.
    """

    def __init__(self, slices: Iterable[slice]) -> None:
        self._slices: list[slice] = []
        for piece in slices:
            if self._slices and self._slices[-1].stop == piece.start:
                piece = slice(self._slices.pop().start, piece.stop)
            self._slices.append(piece)
        self.n = sum(piece.stop - piece.start for piece in self._slices)

    def gather(self, vector_P: Tensor, out_N: Tensor) -> None:
        """Copy the pieces into `out_N`, which may be on another device."""
        start = 0
        for piece in self._slices:
            stop = start + piece.stop - piece.start
            out_N[start:stop].copy_(vector_P[piece])
            start = stop

    def scatter(self, values_N: Tensor, vector_P: Tensor) -> None:
        """Copy `values_N` into the pieces; the opposite of `gather`."""
        start = 0
        for piece in self._slices:
            stop = start + piece.stop - piece.start
            vector_P[piece].copy_(values_N[start:stop])
            start = stop


def all_finite(values: Tensor) -> bool:
    """Whether there is neither inf nor NaN. Local; one pass without a copy."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def adopt_gradients(flat: FlatModel) -> None:
    """Bring gradients that were set to None or assigned back into the flat gradient. Local."""
    for parameter in flat.parameters:
        if not flat.owns_gradient(parameter):
            flat.adopt_gradient(parameter)


def require_float32(kind: str, dtype: str) -> None:
    """Refuse another number format of the model. Local.

    Raises:
        ValueError: `dtype` is not "float32".
    """
    if dtype != "float32":
        raise ValueError(
            f'exchange.kind = "{kind}" sends float32 gradients, but train.dtype = "{dtype}"; use '
            '"float32", or exchange.kind = "dense"'
        )


def require_float32_model(kind: str, flat: FlatModel) -> None:
    """As `require_float32`, of a model that is not described by a [train] table. Local.

    Raises:
        ConfigError: the parameters are not float32.
    """
    try:
        require_float32(kind, str(flat.params_P.dtype).removeprefix("torch."))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def take_back(kind: str, own: State, given: State) -> None:
    """Copy a stored state's tensors into the live ones of `own`. Local.

    Raises:
        ConfigError: they differ in names or shapes.
    """
    shapes = {name: tuple(placed.tensor.shape) for name, placed in own.tensors.items()}
    stored = {name: tuple(placed.tensor.shape) for name, placed in given.tensors.items()}
    if shapes != stored:
        raise ConfigError(
            f'the checkpoint holds for exchange.kind = "{kind}" {stored or "nothing"} and this '
            f"run needs {shapes or 'nothing'}. Resume with the [exchange] and [model] tables the "
            "run was started with"
        )
    for name, placed in own.tensors.items():
        placed.tensor.copy_(given.tensors[name].tensor)
