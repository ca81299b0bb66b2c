from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.order import Position, SampleOrder, Slice
from hpctrain.data.partition import by_dirichlet
from hpctrain.errors import ConfigError

SIZES = st.integers(1, 8)
BATCHES = st.lists(st.integers(1, 40), min_size=1, max_size=12)
COUNTS = st.integers(1, 60)


def orders(n: int, size: int, seed: int = 3, shards: Sequence[np.ndarray] | None = None):
    return [SampleOrder(n, seed, rank, size, shards) for rank in range(size)]


def step(ranks: list[SampleOrder], batch_global: int, left: int | None = None) -> list[Slice]:
    """One step on every rank; what must be equal on all ranks is compared."""
    slices = [order.next(batch_global, left) for order in ranks]
    assert len({(s.epoch, s.batch_global, s.starts_epoch) for s in slices}) == 1
    assert len({order.position for order in ranks}) == 1
    assert slices[0].batch_global == sum(len(s.indices) for s in slices)
    assert 1 <= slices[0].batch_global <= batch_global
    return slices


def joined(slices: list[Slice]) -> list[int]:
    return [int(i) for s in slices for i in s.indices]


def uneven_shards(n: int, size: int, seed: int) -> list[np.ndarray]:
    """Every sample in exactly one shard; some may be empty."""
    owner = np.random.default_rng(seed).integers(0, size, n)
    return [np.flatnonzero(owner == rank).astype(np.uint32) for rank in range(size)]


@given(n=COUNTS, size=SIZES, batches=BATCHES)
def test_every_sample_once_per_epoch_whatever_the_batches(n, size, batches):
    ranks, taken, epochs = orders(n, size), [], 0
    number = 0
    while epochs < 2:
        slices = step(ranks, batches[number % len(batches)])
        number += 1
        assert slices[0].epoch == epochs
        assert slices[0].starts_epoch == (not taken)
        taken += joined(slices)
        assert ranks[0].samples_seen == epochs * n + len(taken)
        if len(taken) == n:
            assert sorted(taken) == list(range(n))
            taken, epochs = [], epochs + 1
    assert ranks[0].position == Position(2, 0)


@given(n=COUNTS, size=SIZES, batches=BATCHES)
def test_the_sequence_and_its_cuts_do_not_depend_on_the_number_of_ranks(n, size, batches):
    one, many = orders(n, 1), orders(n, size)
    for batch_global in batches:
        assert joined(step(many, batch_global)) == joined(step(one, batch_global))


@given(n=st.integers(8, 60), size=SIZES, batch_global=st.integers(1, 40))
def test_shares_differ_by_at_most_one_sample(n, size, batch_global):
    shares = [len(s.indices) for s in step(orders(n, size), batch_global)]
    assert max(shares) - min(shares) <= 1


@given(n=COUNTS, before=SIZES, after=SIZES, batches=BATCHES, stop=st.integers(0, 12))
def test_resume_anywhere_at_another_number_of_ranks(n, before, after, batches, stop):
    whole, first, second = orders(n, 1), orders(n, before), orders(n, after)
    expected = [joined(step(whole, b)) for b in batches]
    got = [joined(step(first, b)) for b in batches[:stop]]
    for rank in second:
        rank.load_state(first[0].state())
    got += [joined(step(second, b)) for b in batches[stop:]]
    assert got == expected


@given(n=COUNTS, size=SIZES, batch_global=st.integers(1, 40), left=st.integers(1, 200))
def test_samples_left_ends_a_run_exactly(n, size, batch_global, left):
    ranks, remaining = orders(n, size), left
    while remaining:
        remaining -= step(ranks, batch_global, remaining)[0].batch_global
    assert ranks[0].samples_seen == left


@given(n=COUNTS, size=SIZES, batches=BATCHES, seed=st.integers(0, 9), left=st.integers(1, 200))
def test_shards_every_sample_once_and_each_rank_its_own(n, size, batches, seed, left):
    shards = uneven_shards(n, size, seed)
    ranks = orders(n, size, shards=shards)
    taken: list[int] = []
    number = remaining = 0
    while ranks[0].position.epoch == 0:
        slices = step(ranks, batches[number % len(batches)])
        number += 1
        assert slices[0].starts_epoch == (not taken)
        for rank, part in enumerate(slices):
            assert set(part.indices.tolist()) <= set(shards[rank].tolist())
        taken += joined(slices)
    assert sorted(taken) == list(range(n))
    ranks, remaining = orders(n, size, shards=shards), left
    while remaining:
        remaining -= step(ranks, 5, remaining)[0].batch_global
    assert ranks[0].samples_seen == left


@given(n=COUNTS, size=SIZES, batches=BATCHES, seed=st.integers(0, 9), stop=st.integers(0, 12))
def test_shards_resume_where_they_stood(n, size, batches, seed, stop):
    shards = uneven_shards(n, size, seed)
    whole, parts = orders(n, size, shards=shards), orders(n, size, shards=shards)
    expected = [[s.indices.tolist() for s in step(whole, b)] for b in batches]
    got = [[s.indices.tolist() for s in step(parts, b)] for b in batches[:stop]]
    fresh = orders(n, size, shards=shards)
    for rank in fresh:
        rank.load_state(parts[0].state())
    got += [[s.indices.tolist() for s in step(fresh, b)] for b in batches[stop:]]
    assert got == expected


def test_ranks_with_equal_shards_take_equal_shares():
    shards = [np.arange(r * 12, r * 12 + 12, dtype=np.uint32) for r in range(4)]
    ranks = orders(48, 4, shards=shards)
    assert [[len(s.indices) for s in step(ranks, 16)] for _ in range(3)] == [[4, 4, 4, 4]] * 3
    assert ranks[0].position == Position(1, 0)


def test_a_rank_shuffles_its_shard_afresh_each_epoch_and_unlike_the_others():
    shards = [np.arange(0, 100, 2, dtype=np.uint32), np.arange(1, 100, 2, dtype=np.uint32)]
    ranks = orders(100, 2, shards=shards)
    first, second = ([s.indices // 2 for s in step(ranks, 100)] for _ in range(2))
    orders_seen = [order.tolist() for order in (*first, *second)]
    assert len({tuple(order) for order in orders_seen}) == 4
    assert list(range(50)) not in orders_seen


def test_a_used_up_shard_shrinks_the_batch_and_is_counted():
    shards = [np.arange(2, dtype=np.uint32), np.arange(2, 12, dtype=np.uint32)]
    ranks = orders(12, 2, shards=shards)
    sizes = [step(ranks, 4)[0].batch_global for _ in range(5)]
    assert sizes == [4, 2, 2, 2, 2]
    assert ranks[0].position == Position(1, 0)


def test_epochs_and_seeds_differ_and_nothing_else_decides():
    np.random.seed(1)  # noqa: NPY002 - must play no part
    first = joined(step(orders(50, 1, seed=0), 50))
    np.random.seed(2)  # noqa: NPY002
    order = SampleOrder(50, 0, 0, 1)
    assert order.next(50).indices.tolist() == first
    assert order.next(50).indices.tolist() != first
    assert joined(step(orders(50, 1, seed=1), 50)) != first


def test_the_order_of_old_checkpoints_stays_what_it_was():
    order = SampleOrder(10, 7, 0, 1)
    assert order.next(10).indices.tolist() == [9, 1, 2, 0, 7, 6, 4, 5, 3, 8]
    assert order.next(10).indices.tolist() == [3, 5, 7, 9, 6, 2, 0, 4, 8, 1]


def test_order_is_kept_in_32_bits():
    assert SampleOrder(1000, 0, 0, 1).next(10).indices.dtype == np.uint32


@pytest.mark.parametrize(("n", "seed", "wrong"), [(11, 0, "11 samples"), (10, 1, "seed 1")])
def test_another_runs_order_is_refused(n, seed, wrong):
    with pytest.raises(ConfigError, match=wrong):
        SampleOrder(10, 0, 0, 1).load_state(SampleOrder(n, seed, 0, 1).state())


def test_shards_at_another_number_of_ranks_are_refused():
    labels = np.arange(40) % 4
    two = orders(40, 2, shards=by_dirichlet(labels, 2, 1.0, 0))
    three = orders(40, 3, shards=by_dirichlet(labels, 3, 1.0, 0))
    with pytest.raises(ConfigError, match=r"2 fixed shards.*3 ranks; continue with 2 ranks"):
        three[0].load_state(two[0].state())
    other = orders(40, 2, shards=by_dirichlet(labels, 2, 0.5, 0))
    with pytest.raises(ConfigError, match=r"data\.alpha differs"):
        other[0].load_state(two[0].state())
    with pytest.raises(ConfigError, match=r"data\.partition"):
        orders(40, 2)[0].load_state(two[0].state())


def test_impossible_requests():
    with pytest.raises(ConfigError, match="no samples"):
        SampleOrder(0, 0, 0, 1)
    with pytest.raises(ConfigError, match="at least one sample"):
        SampleOrder(5, 0, 0, 1).next(0)
    with pytest.raises(ConfigError, match="samples left = 0"):
        SampleOrder(5, 0, 0, 1).next(3, 0)


def test_an_epoch_starts_with_the_first_rank_that_has_samples():
    shards = [np.arange(0, dtype=np.uint32), np.arange(3, dtype=np.uint32)]
    ranks = orders(3, 2, shards=shards)
    slices = [step(ranks, 1) for _ in range(3)]
    assert [s[0].starts_epoch for s in slices] == [True, False, False]
    assert [len(s[1].indices) for s in slices] == [1, 1, 1]
