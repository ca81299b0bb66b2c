from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from hpctrain.data.arrays import ArraySamples
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.order import SampleOrder
from hpctrain.errors import ConfigError, DataError

N = 50


def numbered() -> ArraySamples:
    """Sample i is the number i; so is its target."""
    return ArraySamples(np.arange(N, dtype=np.float32)[:, None], np.arange(N))


def loader(samples=None, rank=0, size=1, **options) -> Loader:
    return Loader(samples or numbered(), SampleOrder(N, 4, rank, size), **options)


def numbers(batch: Batch) -> list[int]:
    return [int(t) for _, targets in batch.micro_batches for t in targets]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_background_batches_are_those_of_the_foreground(prefetch):
    with loader(prefetch=0) as plain, loader(prefetch=prefetch) as ahead:
        for batch_global in [8, 8, 8, 5, 5, 30, 8, 8, 8, 8, 8, 1, 60, 60, 7]:
            expected, got = plain.next(batch_global), ahead.next(batch_global)
            assert numbers(got) == numbers(expected)
            assert (got.epoch, got.batch_global) == (expected.epoch, expected.batch_global)
            assert got.starts_epoch == expected.starts_epoch
            assert ahead.state() == plain.state()
            assert ahead.samples_seen == plain.samples_seen
        assert got.epoch >= 2


@pytest.mark.parametrize("prefetch", [0, 2])
def test_samples_left_is_kept_to_and_nothing_is_made_beyond(prefetch):
    made: list[int] = []

    class Counting(ArraySamples):
        def batch(self, indices, epoch):
            made.append(len(indices))
            return super().batch(indices, epoch)

    left, taken = 27, []
    with loader(Counting(numbered().inputs, numbered().targets), prefetch=prefetch) as source:
        while left:
            taken += numbers(batch := source.next(10, left))
            left -= batch.batch_global
    assert taken == numbers(loader(prefetch=0).next(27))
    assert made == [10, 10, 7]


def test_state_is_what_was_served_not_what_was_made_ahead():
    with loader(prefetch=4) as first:
        for _ in range(3):
            first.next(8)
        state = first.state()
        expected = [numbers(first.next(8)) for _ in range(4)]
    with loader(prefetch=4) as second:
        second.next(31)  # makes ahead from a place that load_state leaves
        second.load_state(state)
        assert [numbers(second.next(8)) for _ in range(4)] == expected


def test_micro_batches():
    with loader(micro_batch=4) as source:
        batch = source.next(10)
        assert [len(targets) for _, targets in batch.micro_batches] == [4, 4, 2]
        assert batch.batch_local == 10
        for inputs, targets in batch.micro_batches:
            assert inputs[:, 0].tolist() == targets.tolist()
            assert inputs.is_contiguous()


def test_ranks_share_a_batch_and_some_may_have_none():
    batches = []
    for rank in range(4):
        with loader(rank=rank, size=4) as source:
            batches.append(source.next(3))
    assert sorted(b.batch_local for b in batches) == [0, 1, 1, 1]
    empty = next(b for b in batches if b.batch_local == 0)
    assert (empty.micro_batches, empty.batch_global) == ((), 3)
    assert [i for b in batches for i in numbers(b)] == numbers(loader(prefetch=0).next(3))


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_a_failing_read_comes_out_unchanged_and_costs_nothing(prefetch):
    class Failing(ArraySamples):
        broken = True

        def batch(self, indices, epoch):
            if Failing.broken and 13 in indices:
                raise DataError("sample 13 is unreadable")
            return super().batch(indices, epoch)

    reference = loader(prefetch=0)
    with loader(Failing(numbered().inputs, numbered().targets), prefetch=prefetch) as source:
        place = numbers(loader(prefetch=0).next(N)).index(13)
        got = [numbers(source.next(7)) for _ in range(place // 7)]
        with pytest.raises(DataError, match="^sample 13 is unreadable$"):
            source.next(7)
        assert source.samples_seen == 7 * len(got)
        Failing.broken = False
        got += [numbers(source.next(7)) for _ in range(2)]
        assert 13 in got[-2]
    assert got == [numbers(reference.next(7)) for _ in got]


def test_an_impossible_request_is_refused_by_next():
    with loader() as source, pytest.raises(ConfigError, match="at least one sample"):
        source.next(0)


def test_close_joins_the_thread():
    def mine() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("hpctrain-loader")]

    with loader(prefetch=2) as source:
        source.next(5)
        assert len(mine()) == 1
    source.close()
    assert mine() == []
    with loader(prefetch=0) as source:
        source.next(5)
        assert mine() == []


def test_a_batch_made_ahead_is_ready_when_it_is_asked_for():
    made = threading.Event()
    calls = []

    class Watched(ArraySamples):
        def batch(self, indices, epoch):
            calls.append(threading.current_thread() is threading.main_thread())
            if len(calls) == 2:
                made.set()
            return super().batch(indices, epoch)

    with loader(Watched(numbered().inputs, numbered().targets), prefetch=1) as source:
        source.next(5)
        assert made.wait(20)  # nobody asked for the second batch
    assert not any(calls)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    device = torch.device("cuda", 0)
    with loader(micro_batch=4, device=device) as source, loader(prefetch=0) as plain:
        for _ in range(20):
            batch = source.next(10)
            assert all(t.device == device for pair in batch.micro_batches for t in pair)
            assert numbers(batch) == numbers(plain.next(10))
