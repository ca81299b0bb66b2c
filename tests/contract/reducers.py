"""What every `DenseReducer` must do, written once: functions of (communicator, make) that assert.

`make(comm, names=..., wire_dtype=...)` makes the reducer under test.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hpctrain.transport.communicator import Communicator, DenseReducer

Make = Callable[..., DenseReducer]
SIZES = (1, 7, 1000, 40_001)
NAMES = [f"bucket of {size}" for size in SIZES]


def gradients(rank: int, step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of one rank at one step; any rank can compute any other's."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in SIZES]


def exact_sums(size: int, step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """In float64, over all ranks."""
    parts = [gradients(rank, step, dtype) for rank in range(size)]
    return [torch.stack([p.double() for p in bucket]).sum(0) for bucket in zip(*parts, strict=True)]


def assert_same_bits(comm: Communicator, tensors: list[torch.Tensor]) -> None:
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    assert len(set(comm.allgather_bytes(data))) == 1


def reduce_step(reducer: DenseReducer, buckets: list[torch.Tensor]) -> None:
    for index, bucket in enumerate(buckets):
        reducer.start(index, bucket)
    reducer.finish()


def sums_are_those_of_all_ranks(comm: Communicator, make: Make) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        reducer = make(comm, names=NAMES, wire_dtype="native")
        assert reducer.name in ("threads", "mpi", "horovod", "nccl")
        assert reducer.algorithm
        for step in range(3):
            buckets = gradients(comm.rank, step, dtype)
            reduce_step(reducer, buckets)
            for bucket, expected in zip(buckets, exact_sums(comm.size, step, dtype), strict=True):
                scale = tolerance * comm.size * 10
                torch.testing.assert_close(bucket.double(), expected, rtol=0, atol=scale)
            assert_same_bits(comm, buckets)
            assert reducer.current == -1
        reducer.close()


def half_precision_rounds_within_bounds(
    comm: Communicator, make: Make, wire_dtype: str, *, roundings: int
) -> None:
    """Every rounding costs at most half a unit in the last place of what is rounded."""
    epsilon = torch.finfo(getattr(torch, wire_dtype)).eps / 2
    reducer = make(comm, names=NAMES, wire_dtype=wire_dtype)
    for step in range(2):
        buckets = gradients(comm.rank, step)
        reduce_step(reducer, buckets)
        everyone = [gradients(rank, step) for rank in range(comm.size)]
        sums = exact_sums(comm.size, step, torch.float32)
        for bucket, expected, *parts in zip(buckets, sums, *everyone, strict=True):
            magnitudes = torch.stack([part.double().abs() for part in parts]).sum(0)
            bound = magnitudes * epsilon * roundings * 1.01 + 1e-7
            assert bucket.dtype == torch.float32
            assert bool(((bucket.double() - expected).abs() <= bound).all())
        assert_same_bits(comm, buckets)
    reducer.close()


def bytes_in_half_precision_are_counted(comm: Communicator, make: Make, wire_dtype: str) -> None:
    reducer = make(comm, names=["one"], wire_dtype=wire_dtype)
    before = np.array([comm.ledger.bytes_sent_intra, comm.ledger.bytes_sent_inter])
    n = 1000 * comm.size
    reduce_step(reducer, [torch.ones(n)])
    reducer.close()
    after = np.array([comm.ledger.bytes_sent_intra, comm.ledger.bytes_sent_inter])
    rank, size, topology = comm.rank, comm.size, comm.topology
    slice_bytes = 2 * n // size
    expected = np.array(topology.alltoall_bytes(rank, slice_bytes))
    if size > 1:
        expected += topology.to_peer_bytes(rank, (rank + 1) % size, (size - 1) * slice_bytes)
    np.testing.assert_array_equal(after - before, expected)


def native_bytes_follow_the_ring(comm: Communicator, make: Make) -> None:
    reducer = make(comm, names=["a", "b"], wire_dtype="native")
    before = comm.ledger.bytes_sent_intra, comm.ledger.bytes_sent_inter
    reduce_step(reducer, [torch.ones(1000), torch.ones(24)])
    reducer.close()
    big, small = (comm.topology.ring_bytes(comm.rank, nbytes) for nbytes in (4000, 96))
    assert comm.ledger.bytes_sent_intra - before[0] == big[0] + small[0]
    assert comm.ledger.bytes_sent_inter - before[1] == big[1] + small[1]
    assert comm.ledger.source == "formula"


def buckets_out_of_order_or_of_odd_shape_are_refused(comm: Communicator, make: Make) -> None:
    reducer = make(comm, names=["a", "b"], wire_dtype="native")
    with pytest.raises(ValueError, match="order"):
        reducer.start(1, torch.zeros(3))
    for wrong in (torch.zeros(2, 2), torch.zeros(6)[::2], torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="1-D"):
            reducer.start(0, wrong)
    reduce_step(reducer, [torch.ones(2), torch.ones(3)])
    with pytest.raises(ValueError, match="order"):
        reducer.start(1, torch.zeros(3))
    reducer.close()
    comm.barrier()


def closing_with_buckets_under_way_does_not_hang(comm: Communicator, make: Make) -> None:
    """As when an exception unwinds: the sums may never complete."""
    reducer = make(comm, names=["a"], wire_dtype="native")
    reducer.start(0, torch.ones(3))
    reducer.close()
