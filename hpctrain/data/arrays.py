"""Samples that are rows of arrays: kept compact, converted batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpctrain.data.augment import crop_flip

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_ROWS = 64


@dataclass(frozen=True)
class ArraySamples:
    """Rows of `inputs` and `targets`, a `Samples`.

    Args:
        inputs: (n, *input_shape) uint8 or float32.
        targets: (n,) uint8 or int64 classes, or (n, outputs) float32 values.
        mean_C, std_C: uint8 inputs only: mean and standard deviation in stored units, of each
            channel or one for all; a batch holds (stored - mean) / std in float32.
        augment_seed: crop and flip each image at random under this seed; None = never.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mean_C: tuple[float, ...] = (0.0,)
    std_C: tuple[float, ...] = (1.0,)
    augment_seed: int | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.inputs.nbytes + self.targets.nbytes

    def batch(self, indices: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        inputs = np.take(self.inputs, indices, axis=0)
        if self.augment_seed is not None:
            inputs = crop_flip(inputs, self.augment_seed, epoch, indices)
        values = torch.from_numpy(inputs)
        if inputs.dtype == np.uint8:
            values = self._normalise(values)
        targets = np.take(self.targets, indices, axis=0)
        kind = np.float32 if targets.dtype.kind == "f" else np.int64
        return values, torch.from_numpy(targets.astype(kind, copy=False))

    def labels(self) -> np.ndarray | None:
        return None if self.targets.dtype.kind == "f" else self.targets

    def _normalise(self, stored: Tensor) -> Tensor:
        # Subtract and multiply in two roundings, never fused: equal on every rank and batch size.
        shape = (-1, *[1] * (stored.ndim - 2))
        mean = torch.tensor(self.mean_C, dtype=torch.float32).view(shape)
        scale = (1.0 / torch.tensor(self.std_C, dtype=torch.float64)).float().view(shape)
        return stored.to(torch.float32).sub_(mean).mul_(scale)


def moments(images_NC: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images (N, C, ...). Local.

    Sums of integers in float64, exact up to 1e11 pixels and so the same in any order; a channel
    that never varies gets a deviation of 1.
    """
    channels = images_NC.shape[1]
    sums_C, squares_C = np.zeros(channels), np.zeros(channels)
    for start in range(0, len(images_NC), _CHUNK_ROWS):
        rows = images_NC[start : start + _CHUNK_ROWS].astype(np.float64)
        rows = rows.reshape(len(rows), channels, -1)
        sums_C += rows.sum(axis=(0, 2))
        squares_C += np.einsum("ncp,ncp->c", rows, rows)  # not BLAS, whose threads would contend
    count = images_NC.size / channels
    mean_C = sums_C / count
    std_C = np.sqrt(np.maximum(squares_C / count - mean_C**2, 0.0))
    return mean_C.tolist(), np.where(std_C > 0, std_C, 1.0).tolist()
