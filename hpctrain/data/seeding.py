"""Random numbers as pure functions of what they are for, a seed, and places (epoch, rank, sample).

Nothing here reads or moves the global generators of Python, NumPy or torch.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of random numbers is for. Values are part of every checkpoint's meaning."""

    ORDER = 1
    PARTITION = 2
    SHARD_ORDER = 3
    AUGMENT = 4
    SPLIT = 5
    SHIFT = 6
    TEACHER = 7
    EXAMPLES = 8
    PROBE = 9


def generator(purpose: Purpose, *key: int) -> np.random.Generator:
    """A PCG64 generator seeded by (purpose, *key). Local.

    The purpose stands first because a seed sequence ignores trailing zeros: the number of keys must
    be the same for all streams of one purpose.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((int(purpose), *key))))


def sample_bits(purpose: Purpose, seed: int, epoch: int, samples_B: np.ndarray) -> np.ndarray:
    """64 random bits for each sample, uint64 (B,), the same in whatever batch it comes. Local.

    Source: the output function of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
    number generators", OOPSLA 2014), applied to a counter; the start is a hash of (seed, epoch).
    """
    start = np.random.SeedSequence((int(purpose), seed, epoch)).generate_state(1, np.uint64)
    bits = start + (samples_B.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = bits ^ (bits >> np.uint64(31))
    return mixed
