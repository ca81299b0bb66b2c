"""Random crop and flip of image batches, a pure function of (seed, epoch, sample).

    pad 4 pixels on each side by reflection -> cut a window of the old size at a random place ->
    mirror left-right with probability 1/2

The usual augmentation of CIFAR-10 (He et al., "Deep residual learning for image recognition",
arXiv:1512.03385, section 4.2). Deliberate difference: they pad with zeros after subtracting the
mean, which uint8 storage cannot express; reflection needs no such value.
"""

from __future__ import annotations

import numpy as np

from hpctrain.data.seeding import Purpose, sample_bits

PAD = 4
"""Pixels by which a crop may shift an image."""


def crop_flip(images_BCHW: np.ndarray, seed: int, epoch: int, samples_B: np.ndarray) -> np.ndarray:
    """Cropped and flipped copies of the images, contiguous. Local.

    Args:
        images_BCHW: more than `PAD` pixels high and wide.
        seed: of the run.
        epoch: in which the images are used.
        samples_B: each image's sample number, which its random draw hangs on.
    """
    if not len(images_BCHW):
        return images_BCHW
    top_B, left_B, mirrored_B = draw(seed, epoch, samples_B)
    height, width = images_BCHW.shape[2:]
    padded = _reflect(images_BCHW)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    cropped = np.ascontiguousarray(windows[np.arange(len(padded)), :, top_B, left_B])
    cropped[mirrored_B] = cropped[mirrored_B, :, :, ::-1]
    return cropped


def draw(seed: int, epoch: int, samples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column of each crop's corner, 0 to 2·PAD, and whether it is mirrored. Local."""
    bits_B = sample_bits(Purpose.AUGMENT, seed, epoch, samples_B)
    places = np.uint64(2 * PAD + 1)
    low = np.uint64(0xFFFFFFFF >> 4)  # 28 bits: the bias of the 9 places is below 1e-7
    top_B = ((bits_B & low) * places >> np.uint64(28)).astype(np.intp)
    left_B = ((bits_B >> np.uint64(28) & low) * places >> np.uint64(28)).astype(np.intp)
    return top_B, left_B, (bits_B >> np.uint64(63)).astype(bool)


def _reflect(images_BCHW: np.ndarray) -> np.ndarray:
    count, channels, height, width = images_BCHW.shape
    shape = (count, channels, height + 2 * PAD, width + 2 * PAD)
    padded = np.empty(shape, images_BCHW.dtype)
    padded[:, :, PAD:-PAD, PAD:-PAD] = images_BCHW
    padded[:, :, PAD:-PAD, :PAD] = images_BCHW[:, :, :, PAD:0:-1]
    padded[:, :, PAD:-PAD, -PAD:] = images_BCHW[:, :, :, -2 : -2 - PAD : -1]
    padded[:, :, :PAD] = padded[:, :, 2 * PAD : PAD : -1]
    padded[:, :, -PAD:] = padded[:, :, -2 - PAD : -2 - 2 * PAD : -1]
    return padded
