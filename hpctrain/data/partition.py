"""Fixed parts of the training set, one per rank, for methods that train on local data.

    shard:      sort by label, cut into P contiguous pieces of equal size
    dirichlet:  for each class k: p ~ Dirichlet(alpha·1_P), rank r gets the share p_r of class k

Small alpha gives each rank few classes and unequal amounts of data; large alpha approaches equal
mixtures. Source of `shard`: McMahan et al., arXiv:1602.05629, section 3 (there two pieces per
client); of `dirichlet`: Yurochkin et al., arXiv:1905.12022, section 4. Deliberate difference: no
minimum size, a rank's part may be empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from hpctrain.data.seeding import Purpose, generator
from hpctrain.data.spec import Samples
from hpctrain.errors import ConfigError
from hpctrain.state import shard_bounds

if TYPE_CHECKING:
    from hpctrain.data.source import Source

Partition = Literal["iid", "shard", "dirichlet"]


def shards_of(source: Source, train: Samples, size: int, seed: int) -> list[np.ndarray] | None:
    """Each rank's own sample numbers as `source` asks, None for iid. Local, equal on all ranks.

    Raises:
        ConfigError: as `by_dirichlet`.
    """
    if source.partition == "iid":
        return None
    labels_N = train.labels()
    if source.partition == "shard":
        return by_label(labels_N, len(train), size)
    assert source.alpha is not None
    return by_dirichlet(labels_N, size, source.alpha, seed)


def by_label(labels_N: np.ndarray | None, n_samples: int, size: int) -> list[np.ndarray]:
    """Contiguous pieces of the samples sorted by label, one per rank. Local.

    Without labels (text, regression) the samples stay in their stored order.
    """
    whole = np.arange(n_samples) if labels_N is None else np.argsort(labels_N, kind="stable")
    pieces = [whole[slice(*shard_bounds(n_samples, rank, size))] for rank in range(size)]
    return [_compact(np.sort(piece), n_samples) for piece in pieces]


def by_dirichlet(
    labels_N: np.ndarray | None, size: int, alpha: float, seed: int
) -> list[np.ndarray]:
    """Random label mixtures, one per rank; every sample in exactly one. Local.

    Raises:
        ConfigError: the samples have no labels.
    """
    if labels_N is None:
        raise ConfigError(
            'data.partition = "dirichlet" mixes classes, and these data have none; use "shard" or '
            '"iid"'
        )
    rng = generator(Purpose.PARTITION, seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(size)]
    for label in np.unique(labels_N):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        shares = rng.dirichlet(np.full(size, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [_compact(np.sort(np.concatenate(part)), len(labels_N)) for part in parts]


def hold_out(
    labels_N: np.ndarray | None, n_samples: int, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers (train, test): `fraction` of every class is held out. Local.

    The same split for every seed, so that runs can be compared. Without labels, plainly random.
    """
    rng = generator(Purpose.SPLIT)
    held = np.zeros(n_samples, bool)
    labels_N = np.zeros(n_samples, np.int64) if labels_N is None else labels_N
    for label in np.unique(labels_N):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        held[members[: round(fraction * len(members))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _compact(indices: np.ndarray, n_samples: int) -> np.ndarray:
    return indices.astype(np.uint32 if n_samples <= 2**32 else np.int64)
