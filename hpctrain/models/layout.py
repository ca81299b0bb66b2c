"""The memory layout of images inside convolutional models: channels last.

On one CPU core convolutions, and above all max-pooling and batch normalisation, are faster there:
the CNN trains 1.4-1.7 times as many images per second as with channels first.
"""

from __future__ import annotations

from torch import Tensor, nn


class ChannelsLast(nn.Module):
    """(B, C, H, W) in any layout -> the same values and shape, channels last in memory."""

    def forward(self, images: Tensor) -> Tensor:
        """Local. Copies where the layout differs; (B, H·W·C) is then contiguous."""
        b, c, h, w = images.shape
        # Not `contiguous(memory_format=channels_last)`: with one channel that returns its argument,
        # whose strides convolutions read as channels first, and under vmap it does not exist.
        return images.permute(0, 2, 3, 1).flatten(1).view(b, h, w, c).permute(0, 3, 1, 2)
