"""Training samples kept aside, for a batch on which all replicas are compared.

Nobody trains on them, so the comparison favours nobody, whatever shard a rank has; they are not
of the held-out set, so that stays unseen.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hpctrain.data.seeding import Purpose, generator
from hpctrain.data.spec import Samples
from hpctrain.errors import ConfigError


class Subset:
    """Some samples of a set, numbered anew; a `Samples`.

    Args:
        base: The set.
        chosen: Its sample numbers, ascending.
    """

    def __init__(self, base: Samples, chosen: np.ndarray) -> None:
        self._base, self._chosen = base, chosen

    @property
    def nbytes(self) -> int:
        """Of the whole set: no sample is stored twice."""
        return self._base.nbytes

    def __len__(self) -> int:
        return len(self._chosen)

    def batch(self, indices: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """As `Samples.batch`."""
        return self._base.batch(self._chosen[indices], epoch)

    def labels(self) -> np.ndarray | None:
        """As `Samples.labels`."""
        labels = self._base.labels()
        return None if labels is None else labels[self._chosen]


def reserve(samples: Samples, count: int, seed: int) -> tuple[Subset, Subset]:
    """Local, equal on all ranks. `count` samples chosen at random, behind the rest.

    Raises:
        ConfigError: there would be nothing left to train on.
    """
    if count >= len(samples):
        raise ConfigError(
            f"sync.probe_samples = {count} takes all {len(samples)} training samples; keep some"
        )
    aside = generator(Purpose.PROBE, seed).permutation(len(samples))[:count]
    rest = np.ones(len(samples), bool)
    rest[aside] = False
    return Subset(samples, np.flatnonzero(rest)), Subset(samples, np.sort(aside))
