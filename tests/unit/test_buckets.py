"""Buckets partition the flat gradient, last parameters first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpctrain.exchange.buckets import make_buckets

SIZES = st.lists(st.integers(0, 5000), min_size=1, max_size=30)


@given(SIZES, st.sampled_from([4, 8]), st.integers(1, 40_000))
def test_buckets_cover_every_entry_once_in_reverse(sizes, itemsize, bucket_bytes):
    names = [f"p{i}" for i in range(len(sizes))]
    buckets = make_buckets(names, sizes, itemsize, bucket_bytes)
    stop = sum(sizes)
    seen = []
    for index, bucket in enumerate(buckets):
        assert bucket.index == index
        assert bucket.stop == stop
        assert bucket.stop - bucket.start == sum(sizes[p] for p in bucket.parameters)
        if len(bucket.parameters) > 1:
            assert (bucket.stop - bucket.start) * itemsize <= bucket_bytes
        stop = bucket.start
        seen += bucket.parameters
    assert stop == 0
    assert seen == list(reversed(range(len(sizes))))


def test_name_tells_the_ends():
    (bucket,) = make_buckets(["first", "middle", "last"], [1, 1, 1], 4, 1 << 20)
    assert bucket.name == "last..first"


def test_a_large_parameter_has_a_bucket_of_its_own():
    buckets = make_buckets(["a", "b", "c"], [10, 1000, 10], 4, 100)
    assert [bucket.parameters for bucket in buckets] == [(2,), (1,), (0,)]
