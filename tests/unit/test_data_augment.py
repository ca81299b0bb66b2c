from __future__ import annotations

import numpy as np
import torch
from data_files import random_images
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.arrays import ArraySamples
from hpctrain.data.augment import PAD, crop_flip, draw

IMAGES = random_images(60, (3, 9, 11))


def by_hand(image: np.ndarray, top: int, left: int, mirrored: bool) -> np.ndarray:
    padded = np.pad(image, ((0, 0), (PAD, PAD), (PAD, PAD)), mode="reflect")
    cropped = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
    return cropped[:, :, ::-1] if mirrored else cropped


def test_equals_numpys_padding_image_by_image():
    samples = np.arange(100, 160)
    got = crop_flip(IMAGES, 5, 2, samples)
    for image, result, *drawn in zip(IMAGES, got, *draw(5, 2, samples), strict=True):
        np.testing.assert_array_equal(result, by_hand(image, *drawn))
    assert got.flags.c_contiguous


@given(st.lists(st.integers(0, 59), min_size=0, max_size=20), st.integers(0, 3))
def test_a_sample_is_augmented_alike_in_whatever_batch(chosen, epoch):
    samples = ArraySamples(IMAGES, np.zeros(60, np.uint8), (1.0, 2.0, 3.0), (3.0, 5.0, 7.0), 9)
    indices = np.array(chosen, np.uint32)
    together = samples.batch(indices, epoch)[0]
    alone = [samples.batch(indices[i : i + 1], epoch)[0] for i in range(len(indices))]
    assert torch.equal(together, torch.cat([torch.empty(0, 3, 9, 11), *alone]))


def test_draws_are_uniform_and_change_with_seed_epoch_and_sample():
    samples = np.arange(90_000)
    top, left, mirrored = draw(0, 0, samples)
    expected = len(samples) / (2 * PAD + 1)
    for place in (top, left):
        counts = np.bincount(place, minlength=2 * PAD + 1)
        assert len(counts) == 2 * PAD + 1
        assert abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(samples))
    assert abs(np.corrcoef([top, left, mirrored])[np.triu_indices(3, 1)]).max() < 0.02
    assert abs(np.corrcoef(top[1:], top[:-1])[0, 1]) < 0.02
    for other in (draw(0, 1, samples), draw(1, 0, samples)):
        assert abs((other[0] == top).mean() - 1 / 9) < 0.01


def test_batches_are_copies():
    before = IMAGES.copy()
    samples = ArraySamples(IMAGES, np.zeros(60, np.uint8))
    samples.batch(np.arange(5), 0)[0].zero_()
    crop_flip(IMAGES, 0, 0, np.arange(60))
    np.testing.assert_array_equal(IMAGES, before)
