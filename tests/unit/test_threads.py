from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from contract import communicators, reducers

from hpctrain.errors import BackendError
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.mpi_reducer import MpiReducer
from hpctrain.transport.threads import (
    DeadlockError,
    RankError,
    ThreadReducer,
    run_threads,
)

LAYOUTS = [[0], [0, 0], [0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0]]
LAYOUTS += [[0, 1, 2, 0, 1, 0, 0, 3]]


@pytest.mark.parametrize("check", communicators.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("node_of", LAYOUTS, ids=lambda node_of: "".join(map(str, node_of)))
def test_contract(check: Callable[[Communicator], None], node_of: list[int]) -> None:
    run_threads(len(node_of), check, node_of=node_of)


@pytest.mark.parametrize("check", communicators.CHECKS, ids=lambda check: check.__name__)
def test_contract_where_only_waits_hand_over(check: Callable[[Communicator], None]) -> None:
    run_threads(4, check, node_of=[0, 1, 1, 0], only_waits=True)


def named(check: Callable[..., None]) -> str:
    """The same in every process, which the name of a `partial` is not."""
    if isinstance(check, partial):
        return " ".join([check.func.__name__, *map(str, check.keywords.values())])
    return check.__name__


REDUCER_CHECKS = [
    reducers.sums_are_those_of_all_ranks,
    partial(reducers.half_precision_rounds_within_bounds, wire_dtype="float16", roundings=2),
    partial(reducers.half_precision_rounds_within_bounds, wire_dtype="bfloat16", roundings=2),
    partial(reducers.bytes_in_half_precision_are_counted, wire_dtype="bfloat16"),
    reducers.native_bytes_follow_the_ring,
    reducers.buckets_out_of_order_or_of_odd_shape_are_refused,
    reducers.closing_with_buckets_under_way_does_not_hang,
]


@pytest.mark.parametrize("check", REDUCER_CHECKS, ids=named)
@pytest.mark.parametrize("node_of", LAYOUTS, ids=lambda node_of: "".join(map(str, node_of)))
def test_reducer_contract(check: Callable[..., None], node_of: list[int]) -> None:
    run_threads(len(node_of), lambda comm: check(comm, ThreadReducer), node_of=node_of)


@pytest.mark.parametrize("check", REDUCER_CHECKS, ids=named)
def test_reducer_contract_without_a_thread_of_its_own(check: Callable[..., None]) -> None:
    """`MpiReducer` where MPI lacks MPI_THREAD_MULTIPLE: sums run in `finish`."""
    run_threads(3, lambda comm: check(comm, MpiReducer), node_of=[0, 1, 0])


def test_missing_overlap_is_said() -> None:
    algorithms = run_threads(2, lambda comm: MpiReducer(comm, names=["a"]).algorithm)
    assert all("no overlap (needs MPI_THREAD_MULTIPLE)" in text for text in algorithms)


def test_half_precision_buckets_need_a_half_wire() -> None:
    def body(comm: Communicator) -> None:
        reducer = ThreadReducer(comm, names=["a"])
        reducer.start(0, torch.ones(4, dtype=torch.bfloat16))
        with pytest.raises(TypeError, match="wire_dtype"):
            reducer.finish()
        halves = ThreadReducer(comm, names=["a"], wire_dtype="bfloat16")
        bucket = torch.full((5,), comm.rank + 1.0, dtype=torch.bfloat16)
        reducers.reduce_step(halves, [bucket])
        assert bucket.tolist() == [3.0] * 5

    run_threads(2, body)


def test_sums_are_in_rank_order() -> None:
    values = [1e16, 1.0, -1e16, 1.0]

    def body(comm: Communicator) -> float:
        buffer = np.array([values[comm.rank]])
        comm.allreduce(buffer)
        return float(buffer[0])

    assert run_threads(4, body) == [((1e16 + 1.0) - 1e16) + 1.0] * 4


def test_results_come_in_rank_order() -> None:
    assert run_threads(5, lambda comm: comm.rank**2) == [0, 1, 4, 9, 16]


def test_ranks_run_one_at_a_time_and_repeatably() -> None:
    def trace() -> list[tuple[int, int]]:
        steps: list[tuple[int, int]] = []
        running: list[int] = []

        def body(comm: Communicator) -> None:
            box = comm.mailbox()
            for number in range(4):
                running.append(comm.rank)
                time.sleep(0.001)
                assert running == [comm.rank]
                running.clear()
                steps.append((comm.rank, number))
                box.post((comm.rank + 1) % comm.size, np.zeros(1))

        run_threads(3, body)
        return steps

    first = trace()
    assert trace() == first
    assert sorted(first[:3]) == [(0, 0), (1, 0), (2, 0)]


def test_a_script_decides_the_interleaving() -> None:
    def body(comm: Communicator, order: list[int]) -> None:
        box = comm.mailbox()
        for _ in range(3):
            order.append(comm.rank)
            box.poll()

    order: list[int] = []
    run_threads(2, partial(body, order=order))
    assert order == [1, 0, 1, 0, 1, 0] or order == [0, 1, 0, 1, 0, 1]
    scripted: list[int] = []
    run_threads(2, partial(body, order=scripted), interleave=[0, 0, 1, 1, 1, 1, 1, 1])
    assert scripted != order
    assert sorted(scripted) == [0, 0, 0, 1, 1, 1]


def draws(comm: Communicator) -> list[float]:
    numbers = []
    for _ in range(3):
        numbers += [float(torch.rand(())), random.random(), float(np.random.random())]  # noqa: NPY002
        comm.barrier()
    return numbers


def test_random_states_belong_to_ranks() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    alone = run_threads(1, draws)[0]
    expected_next = float(torch.rand(()))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert run_threads(3, draws) == [alone] * 3
    assert float(torch.rand(())) == expected_next


def test_seeding_in_one_rank_does_not_touch_the_others() -> None:
    def body(comm: Communicator) -> list[float]:
        torch.manual_seed(100 + comm.rank)
        comm.barrier()
        first = torch.rand(2)
        comm.barrier()
        return [*first.tolist(), float(torch.rand(()))]

    def expected(seed: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(
            [torch.rand(2, generator=generator), torch.rand(1, generator=generator)]
        ).tolist()

    assert run_threads(3, body) == [expected(100 + rank) for rank in range(3)]


def test_a_raising_rank_is_named_and_the_others_released() -> None:
    released = []

    def body(comm: Communicator) -> None:
        try:
            comm.barrier()
            if comm.rank == 2:
                raise KeyError("lost")
            comm.allreduce(np.zeros(3))
        finally:
            released.append(comm.rank)

    with pytest.raises(RankError, match="rank 2 of 4 raised KeyError: 'lost'") as caught:
        run_threads(4, body)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.rank == 2
    assert sorted(released) == [0, 1, 2, 3]


def test_cleaning_up_with_collectives_after_a_failure_does_not_hang() -> None:
    def body(comm: Communicator) -> None:
        try:
            if comm.rank == 0:
                raise BackendError("no")
            comm.barrier()
        finally:
            comm.barrier()

    with pytest.raises(RankError) as caught:
        run_threads(3, body)
    assert isinstance(caught.value.__cause__, BackendError)


def test_a_deadlock_says_what_each_rank_waits_for() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.irecv(np.empty(4, np.uint8), 1, tag=3).wait()
        elif comm.rank == 1:
            comm.allreduce(np.zeros(5))

    with pytest.raises(DeadlockError) as caught:
        run_threads(3, body)
    message = str(caught.value)
    assert "rank 0 waits for 4 bytes from rank 1 (tag 3)" in message
    assert "rank 1 waits in allreduce(sum) of 5 float64 (call 0) for rank(s) 0, 2" in message
    assert "rank 2 has returned" in message


def test_a_send_that_counts_on_buffering_is_a_deadlock() -> None:
    def body(comm: Communicator) -> None:
        other = 1 - comm.rank
        comm.isend(np.zeros(3), other).wait()
        comm.irecv(np.zeros(3), other).wait()

    with pytest.raises(DeadlockError, match="for rank 1 to receive 24 bytes"):
        run_threads(2, body)


def test_different_collectives_are_named() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.barrier()
        else:
            comm.allreduce(np.zeros(2))

    with pytest.raises(RankError, match=r"rank\(s\) .* (barrier|allreduce)"):
        run_threads(2, body)


def test_a_backward_pass_runs_in_its_ranks_thread() -> None:
    def body(comm: Communicator) -> list[float]:
        weight = torch.ones(3, requires_grad=True)
        reducer = ThreadReducer(comm, names=["w"])

        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            reducer.start(0, parameter.grad)

        weight.register_post_accumulate_grad_hook(hook)
        (weight.sum() * (comm.rank + 1)).backward()
        reducer.finish()
        assert weight.grad is not None
        return weight.grad.tolist()

    assert run_threads(3, body) == [[6.0] * 3] * 3


def test_wrong_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="node_of"):
        run_threads(2, lambda comm: None, node_of=[0])
    with pytest.raises(ValueError, match="at least one rank"):
        run_threads(0, lambda comm: None)
