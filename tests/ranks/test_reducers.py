from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from contract import reducers

from hpctrain.errors import BackendError
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.hvd import HorovodReducer
from hpctrain.transport.mpi import MpiReducer
from hpctrain.transport.nccl import NcclReducer

make_gloo = partial(NcclReducer, backend="gloo", timeout_s=60.0)
needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed: make horovod"
)
MAKES = [
    pytest.param(MpiReducer, id="mpi"),
    pytest.param(HorovodReducer, id="horovod", marks=needs_horovod),
    pytest.param(make_gloo, id="gloo"),
]
all_sizes = pytest.mark.ranks(1, 2, 3, 4)


@all_sizes
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    "check",
    [
        reducers.sums_are_those_of_all_ranks,
        reducers.native_bytes_follow_the_ring,
        reducers.buckets_out_of_order_or_of_odd_shape_are_refused,
    ],
    ids=lambda check: check.__name__,
)
def test_contract(check: Callable[..., None], make: reducers.Make, comm: Communicator) -> None:
    check(comm, make)


@all_sizes
@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("make", MAKES)
def test_half_precision(wire_dtype: str, make: reducers.Make, comm: Communicator) -> None:
    as_bytes = make is MpiReducer or (make is HorovodReducer and wire_dtype == "bfloat16")
    roundings = 2 if as_bytes else comm.size + 1
    reducers.half_precision_rounds_within_bounds(comm, make, wire_dtype, roundings=roundings)
    if as_bytes:
        reducers.bytes_in_half_precision_are_counted(comm, make, wire_dtype)


@all_sizes
def test_closing_with_buckets_under_way_does_not_hang(comm: Communicator) -> None:
    reducers.closing_with_buckets_under_way_does_not_hang(comm, MpiReducer)


@all_sizes
def test_big_buckets_overlap_and_agree(comm: Communicator) -> None:
    """Above the size from which Open MPI is told to run a ring."""
    reducer = MpiReducer(comm, names=["a", "b", "c"])
    buckets = [
        torch.randn(700_000, generator=torch.Generator().manual_seed(10 * index + comm.rank))
        for index in range(3)
    ]
    expected = [bucket.clone() for bucket in buckets]
    reducers.reduce_step(reducer, buckets)
    for bucket, total in zip(buckets, expected, strict=True):
        comm.allreduce(total.numpy())
        assert torch.equal(bucket, total)
    reducers.assert_same_bits(comm, buckets)
    reducer.close()


@pytest.mark.ranks(2, 3)
def test_main_thread_and_reducer_communicate_at_the_same_time(comm: Communicator) -> None:
    reducer = MpiReducer(comm, names=["a"])
    other = comm.split(0, comm.rank)
    assert other is not None
    for step in range(20):
        bucket = torch.full((50_000,), float(comm.rank + step))
        reducer.start(0, bucket)
        vote = np.array([step + comm.rank])
        handle = other.iallreduce(vote)
        reducer.finish()
        handle.wait()
        assert bucket[0] == sum(range(comm.size)) + step * comm.size
        assert vote[0] == sum(range(comm.size)) + step * comm.size
    reducer.close()


@pytest.mark.ranks(2)
def test_an_error_in_the_thread_surfaces_in_finish(comm: Communicator) -> None:
    reducer = MpiReducer(comm, names=["a"])
    reducer.start(0, torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="wire_dtype"):
        reducer.finish()
    reducer.close()


@needs_horovod
@pytest.mark.ranks(2, 3)
def test_horovod_refuses_a_part_of_the_world(comm: Communicator) -> None:
    part = comm.split(0 if comm.rank < comm.size - 1 else 1)
    assert part is not None
    with pytest.raises(BackendError, match='dense_backend = "mpi"'):
        HorovodReducer(part, names=["a"])


@needs_horovod
@pytest.mark.ranks(2)
def test_horovod_keeps_the_users_fusion_and_says_so(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "1048576")
    reducer = HorovodReducer(comm, names=["a"])
    assert "HOROVOD_FUSION_THRESHOLD=1048576" in reducer.algorithm
    reducers.reduce_step(reducer, [torch.ones(10)])
    reducer.close()


@pytest.mark.ranks(1, 2)
def test_a_missing_horovod_names_the_remedies(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    with pytest.raises(BackendError, match="make horovod") as caught:
        HorovodReducer(comm, names=["a"])
    assert 'exchange.dense_backend = "mpi"' in str(caught.value)
    reducer = HorovodReducer(comm, names=["a"], wire_dtype="bfloat16")
    bucket = torch.ones(5)
    reducers.reduce_step(reducer, [bucket])
    assert bucket.tolist() == [float(comm.size)] * 5
    reducer.close()
