"""A small convolutional network for small images (8x8 digits to 32x32 photographs).

per entry of `channels`:  conv 3x3 -> relu -> max-pool 2x2
then:                     flatten -> linear(hidden) -> relu -> dropout -> linear(n_outputs)
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError
from hpctrain.models.fit import require_fit
from hpctrain.models.layout import ChannelsLast
from hpctrain.table import Table


class Cnn(Table):
    """[model] kind = "cnn": convolution blocks and two dense layers."""

    kind: Literal["cnn"] = "cnn"
    """The model."""
    channels: list[Annotated[int, Field(ge=1)]] = Field(default=[16, 32], min_length=1)
    """Channels of each block; each block halves height and width."""
    hidden: int = Field(default=64, ge=1)
    """Width of the dense layer."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability with which a value of the dense layer is zeroed in training."""

    def build(self, spec: Spec) -> nn.Module:
        """The module for `spec`: (B, channels, height, width) -> (B, n_outputs). Local.

        Raises:
            ConfigError: the data are not images, or too small for so many blocks.
        """
        require_fit(self.kind, spec)
        channels_in, height, width = spec.input_shape
        if min(height, width) < 2 ** len(self.channels):
            raise ConfigError(
                f"model.channels has {len(self.channels)} entries, each halves the image, but the "
                f"images have {height}x{width} pixels. Give fewer channels."
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict(layout=ChannelsLast())
        for block, channels_out in enumerate(self.channels, start=1):
            layers[f"conv{block}"] = nn.Conv2d(channels_in, channels_out, 3, padding=1)
            layers[f"relu{block}"] = nn.ReLU(inplace=True)
            layers[f"pool{block}"] = nn.MaxPool2d(2)
            channels_in, height, width = channels_out, height // 2, width // 2
        layers["flatten"] = nn.Flatten()
        layers["dense"] = nn.Linear(channels_in * height * width, self.hidden)
        layers["relu"] = nn.ReLU(inplace=True)
        if self.dropout > 0.0:
            layers["dropout"] = nn.Dropout(self.dropout)
        layers["head"] = nn.Linear(self.hidden, spec.n_outputs)
        return nn.Sequential(layers)
