"""The keys that every `[data]` table has, and those that several share."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from hpctrain.data.arrays import moments
from hpctrain.data.augment import PAD
from hpctrain.data.partition import Partition
from hpctrain.errors import ConfigError
from hpctrain.table import Table


class Source(Table):
    """Where data lie and how they are dealt out to ranks."""

    root: str = ""
    """Folder that relative paths start from; by default $HPCTRAIN_DATA, else the working one."""
    partition: Partition = "iid"
    """iid: one global random order; shard, dirichlet: a fixed part of the samples for each rank."""
    alpha: float | None = Field(default=None, gt=0)
    """Concentration of partition = "dirichlet": small = few classes per rank, large = even."""
    prefetch: int = Field(default=1, ge=0, le=64)
    """Batches that a background thread makes ahead; 0 = none."""
    limit_train: int | None = Field(default=None, ge=1)
    """Keep only the first so many training samples, for short runs."""
    limit_test: int | None = Field(default=None, ge=1)
    """Keep only the first so many held-out samples."""

    @model_validator(mode="after")
    def _partition_fits(self) -> Source:
        if self.partition == "dirichlet" and not self._has_labels():
            raise ValueError(
                'partition = "dirichlet" mixes classes, and these data have none; use "shard" or '
                '"iid"'
            )
        if (self.partition == "dirichlet") != (self.alpha is not None):
            raise ValueError(
                'alpha belongs to partition = "dirichlet", and only to it; got partition = '
                f'"{self.partition}" and {"no alpha" if self.alpha is None else "an alpha"}'
            )
        return self

    def _has_labels(self) -> bool:
        return True


def at_most(count: int, limit: int | None) -> int:
    """`count`, or the limit if that is smaller. Local."""
    return count if limit is None else min(count, limit)


class Images(Source):
    """Keys of sources of uint8 images."""

    augment: Literal["none", "crop-flip"] = "none"
    """crop-flip: shift each training image by up to 4 pixels and mirror it, afresh each epoch."""
    mean: list[float] = []
    """Mean of each channel on the scale 0 to 1; by default that of the training images."""
    std: list[Annotated[float, Field(gt=0)]] = []
    """Standard deviation of each channel on the scale 0 to 1; by default as `mean`."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> Images:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"give mean and std for the same channels; got {len(self.mean)} and {len(self.std)}"
            )
        return self

    def check_images(self, channels: int, height: int, width: int) -> None:
        """Compare the keys with the images found. Local.

        Raises:
            ConfigError: they do not fit.
        """
        if self.mean and len(self.mean) != channels:
            raise ConfigError(
                f"data.mean and data.std have {len(self.mean)} entries; the images have {channels} "
                "channel(s). Give one value per channel, or none."
            )
        if self.augment == "crop-flip" and min(height, width) <= PAD:
            raise ConfigError(
                f'data.augment = "crop-flip" shifts by {PAD} pixels; the images have '
                f'{height}x{width}. Use "none".'
            )

    def scale(self, images: np.ndarray) -> dict[str, list[float]]:
        """Facts for normalisation in stored units (0 to 255), from keys or images. Local."""
        if self.mean:
            return {"mean": [255 * m for m in self.mean], "std": [255 * s for s in self.std]}
        mean, std = moments(images)
        return {"mean": mean, "std": std}
