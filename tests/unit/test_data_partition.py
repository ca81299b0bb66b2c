from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data import Digits, Synthetic
from hpctrain.data.arrays import ArraySamples
from hpctrain.data.partition import by_dirichlet, by_label, hold_out, shards_of
from hpctrain.errors import ConfigError

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(np.array)


@given(labels=LABELS, size=st.integers(1, 8), alpha=st.sampled_from([1e-3, 0.1, 1.0, 100.0]))
def test_every_sample_is_in_exactly_one_part(labels, size, alpha):
    for parts in (
        by_label(labels, len(labels), size),
        by_label(None, len(labels), size),
        by_dirichlet(labels, size, alpha, 3),
    ):
        assert len(parts) == size
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


def test_label_pieces_are_contiguous_in_the_sorted_order_and_equal():
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    parts = by_label(labels, 1000, 5)
    assert [len(part) for part in parts] == [200] * 5
    bounds = [(labels[part].min(), labels[part].max()) for part in parts]
    assert all(a[1] <= b[0] for a, b in zip(bounds, bounds[1:], strict=False))


def test_alpha_decides_how_mixed_the_parts_are():
    labels = np.arange(20_000) % 10

    def spread(alpha: float) -> float:
        """Standard deviation over ranks of a class's share: 0 = all ranks alike."""
        parts = by_dirichlet(labels, 4, alpha, 0)
        counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
        return float((counts / 2000).std(0).mean())

    # A Dirichlet share of 4 ranks has variance 3/16 / (4·alpha + 1).
    for alpha in (0.1, 1.0, 10.0):
        assert spread(alpha) == pytest.approx((3 / 16 / (4 * alpha + 1)) ** 0.5, rel=0.35)
    assert spread(1e6) < 0.01


def test_parts_depend_on_the_seed_alone():
    labels = np.arange(500) % 7
    first, again, other = (by_dirichlet(labels, 3, 0.5, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_dirichlet_needs_labels():
    floats = ArraySamples(np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32))
    source = Digits(partition="dirichlet", alpha=1.0)
    with pytest.raises(ConfigError, match="these data have none"):
        shards_of(source, floats, 2, 0)


def test_shards_of():
    samples = ArraySamples(np.zeros((6, 2), np.float32), np.array([1, 0, 1, 0, 1, 0]))
    assert shards_of(Digits(), samples, 2, 0) is None
    parts = shards_of(Digits(partition="shard"), samples, 2, 0)
    assert parts is not None
    assert [part.tolist() for part in parts] == [[1, 3, 5], [0, 2, 4]]
    source = Synthetic(partition="dirichlet", alpha=0.5)
    parts = shards_of(source, samples, 2, 0)
    expected = by_dirichlet(samples.targets, 2, 0.5, 0)
    assert parts is not None
    assert [p.tolist() for p in parts] == [p.tolist() for p in expected]


def test_hold_out_takes_its_share_of_every_class_and_never_changes():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 20)
    train, test = hold_out(labels, 100, 0.2)
    assert np.bincount(labels[test]).tolist() == [10, 6, 4]
    assert sorted([*train, *test]) == list(range(100))
    assert np.array_equal(test, hold_out(labels, 100, 0.2)[1])
