"""ResNet-20 for small images.

    x -> conv3x3(16) -> 3 stages of 3 blocks (16, 32, 64 channels) -> mean over pixels -> linear
    block: y = relu(x' + norm(conv(relu(norm(conv(x))))));  the first block of stages 2 and 3 halves
    height and width, and x' = x subsampled and padded with zero channels (option A)

269,722 parameters for 3x32x32 inputs and 10 classes (the paper's 0.27 M).

Source: K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", 2015,
arXiv 1512.03385, section 4.2 with n = 3. Deliberate difference: `norm` is by default group
normalisation (Y. Wu, K. He, 2018, arXiv 1803.08494) with 8 groups, because batch normalisation
makes each rank's gradient depend on which samples it shares a forward pass with, so that results
change with the number of ranks and the micro-batch.

Layout: activations are kept channels-last; on one CPU core that is the faster layout with batch
normalisation (630 against 540 images/s) and an equal one with group normalisation.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError
from hpctrain.models.fit import require_fit
from hpctrain.models.layout import ChannelsLast
from hpctrain.table import Table

_GROUPS = 8


class Resnet20(Table):
    """[model] kind = "resnet20": 20 layers, for images of about 32x32 pixels."""

    kind: Literal["resnet20"] = "resnet20"
    """The model."""
    norm: Literal["group", "batch"] = "group"
    """Normalisation: "group" (results do not depend on the number of ranks) or "batch" (the
    paper's; statistics are each rank's own)."""

    def build(self, spec: Spec) -> nn.Module:
        """The module for `spec`: (B, channels, height, width) -> (B, n_outputs). Local.

        Raises:
            ConfigError: the data are not images of at least 8x8 pixels.
        """
        require_fit(self.kind, spec)
        channels, height, width = spec.input_shape
        if min(height, width) < 8:
            raise ConfigError(
                f'model.kind = "resnet20" needs images of at least 8x8 pixels; these have '
                f'{height}x{width}. Take model.kind = "cnn" or "mlp".'
            )
        return _ResNet(channels, spec.n_outputs, self.norm)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(_GROUPS, channels)


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, norm: str) -> None:
        super().__init__()
        self.stride = 1 if channels_in == channels_out else 2
        self.pad = (channels_out - channels_in) // 2
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, self.stride, 1, bias=False)
        self.norm1 = _norm(norm, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x, inplace=True)


class _ResNet(nn.Module):
    def __init__(self, channels: int, n_outputs: int, norm: str) -> None:
        super().__init__()
        self.layout = ChannelsLast()
        self.conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.norm = _norm(norm, 16)
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(
            *(
                _Block(before, after, norm)
                for before, after in zip(widths, widths[1:], strict=False)
            )
        )
        self.head = nn.Linear(64, n_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(self.layout(images))), inplace=True)
        out: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return out
