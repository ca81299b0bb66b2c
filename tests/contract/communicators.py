"""What every `Communicator` must do, written once: functions of a communicator that assert.

`tests/unit/test_threads.py` runs them on threads, `tests/ranks/test_communicator.py` under mpirun.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from hpctrain.errors import BackendError
from hpctrain.transport.communicator import Communicator

DTYPES = ("float32", "float64", "int32", "int64", "uint8")
LENGTHS = (0, 1, 3, 1000, 300_001)


def agrees(comm: Communicator, data: bytes) -> bool:
    """Whether all ranks hold the same bytes."""
    return len(set(comm.allgather_bytes(data))) == 1


def sent(comm: Communicator) -> tuple[int, int]:
    return comm.ledger.bytes_sent_intra, comm.ledger.bytes_sent_inter


def sums_are_exact_for_every_dtype_and_length(comm: Communicator) -> None:
    for dtype in DTYPES:
        for length in LENGTHS:
            mine = (np.arange(length) % 7 + comm.rank).astype(dtype)
            comm.allreduce(mine)
            expected = (np.arange(length) % 7) * comm.size + sum(range(comm.size))
            np.testing.assert_array_equal(mine, expected.astype(dtype))


def maxima_and_minima(comm: Communicator) -> None:
    for op, expected in (("max", comm.size - 1), ("min", 0)):
        buffer = np.full((2, 3), comm.rank, np.float64)
        comm.allreduce(buffer, op)  # type: ignore[arg-type]
        np.testing.assert_array_equal(buffer, np.full((2, 3), expected))


def sums_have_the_same_bits_on_all_ranks(comm: Communicator) -> None:
    for length in (5, 70_001, 600_001):
        buffer = np.random.default_rng(comm.rank).standard_normal(length).astype(np.float32)
        comm.allreduce(buffer)
        assert agrees(comm, buffer.tobytes())
        later = np.random.default_rng(comm.rank).standard_normal(length).astype(np.float32)
        comm.iallreduce(later).wait()
        assert agrees(comm, later.tobytes())


def half_precision_and_strided_buffers_are_refused(comm: Communicator) -> None:
    for dtype in (np.float16, np.complex64, np.dtype(">f4")):
        with pytest.raises(TypeError, match="float32"):
            comm.allreduce(np.zeros(3, dtype))
        with pytest.raises(TypeError, match="float32"):
            comm.iallreduce(np.zeros(3, dtype))
    with pytest.raises(ValueError, match="contiguous"):
        comm.allreduce(np.zeros((4, 4), np.float32)[:, 0])
    with pytest.raises(ValueError, match='"sum", "max" or "min"'):
        comm.allreduce(np.zeros(3), "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="receive buffer"):
        comm.iallgather(np.zeros(2), np.zeros(2 * comm.size + 1))
    if comm.size > 1:
        with pytest.raises(ValueError, match="equal slices"):
            comm.ialltoall(np.zeros(comm.size + 1), np.zeros(comm.size + 1))
    comm.barrier()


def non_blocking_collectives_complete_in_any_order(comm: Communicator) -> None:
    rank, size = comm.rank, comm.size
    total = np.full(1000, rank + 1, np.int64)
    gathered = np.empty(size * 3, np.float32)
    exchanged = np.empty(size * 2, np.int32)
    handles = [
        comm.iallreduce(total),
        comm.iallgather(np.full(3, rank, np.float32), gathered),
        comm.ialltoall(np.repeat(np.arange(size, dtype=np.int32), 2) + 100 * rank, exchanged),
    ]
    for handle in reversed(handles):
        handle.wait()
    assert all(handle.test() for handle in handles)
    handles[0].wait()
    np.testing.assert_array_equal(total, np.full(1000, size * (size + 1) // 2))
    np.testing.assert_array_equal(gathered, np.repeat(np.arange(size), 3))
    np.testing.assert_array_equal(exchanged, np.repeat(np.arange(size) * 100 + rank, 2))


def empty_payloads_are_legal(comm: Communicator) -> None:
    nothing = np.empty(0, np.float32)
    comm.allreduce(nothing)
    comm.iallgather(nothing, np.empty(0, np.float32)).wait()
    comm.ialltoall(nothing, np.empty(0, np.float32)).wait()
    comm.broadcast(nothing, comm.size - 1)
    assert comm.allgather_bytes(b"") == [b""] * comm.size
    assert comm.broadcast_bytes(b"" if comm.rank == 0 else None, 0) == b""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    handles = [comm.irecv(nothing, left, 5), comm.isend(nothing, right, 5)]
    for handle in handles:
        handle.wait()


def gathered_bytes_may_differ_in_length(comm: Communicator) -> None:
    payload = bytes([comm.rank]) * (comm.rank * 1000)
    expected = [bytes([rank]) * (rank * 1000) for rank in range(comm.size)]
    assert comm.allgather_bytes(payload) == expected


def broadcasts_reach_all_from_every_root(comm: Communicator) -> None:
    for root in range(comm.size):
        for length, segment_bytes in ((1, 1 << 20), (100, 64), (1001, 8 * 1001), (4000, 4096)):
            buffer = np.full(length, -1.0)
            if comm.rank == root:
                buffer[:] = np.arange(length) + root
            comm.broadcast(buffer, root, segment_bytes)
            np.testing.assert_array_equal(buffer, np.arange(length) + root)
        text = f"from {root}".encode() * 100
        assert comm.broadcast_bytes(text if comm.rank == root else None, root) == text
    with pytest.raises(ValueError, match="root"):
        comm.broadcast(np.zeros(1), comm.size)
    with pytest.raises(ValueError, match="root"):
        comm.broadcast_bytes(None if comm.rank == 0 else b"", 0)


def a_broadcast_crosses_each_link_once(comm: Communicator) -> None:
    topology = comm.topology
    for root in range(comm.size):
        before = sent(comm)
        comm.broadcast(np.zeros(10_000, np.uint8), root, 1000)
        intra, inter = (after - start for after, start in zip(sent(comm), before, strict=True))
        total = np.array([intra, inter], np.int64)
        leaving = np.zeros(topology.n_nodes, np.int64)
        leaving[topology.node_of[comm.rank]] = inter
        comm.allreduce(total)
        comm.allreduce(leaving)
        assert total.tolist() == [
            (comm.size - topology.n_nodes) * 10_000,
            (topology.n_nodes - 1) * 10_000,
        ]
        assert leaving.max(initial=0) <= 10_000


def messages_keep_their_order_and_their_tag(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    first, second, other = (np.empty(4, np.int64) for _ in range(3))
    handles = [
        comm.irecv(other, left, tag=7),
        comm.irecv(first, left),
        comm.irecv(second, left),
        comm.isend(np.full(4, 1), right),
        comm.isend(np.full(4, 2), right),
        comm.isend(np.full(4, 3), right, tag=7),
    ]
    for handle in handles:
        handle.wait()
    assert (first[0], second[0], other[0]) == (1, 2, 3)


def a_message_must_fill_its_buffer(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.size == 1:
        return  # Open MPI cuts a message to oneself short without a word
    for length in (2, 4):
        receive = comm.irecv(np.empty(3, np.uint8), left)
        send = comm.isend(np.zeros(length, np.uint8), right)
        with pytest.raises(ValueError, match="fill its buffer"):
            receive.wait()
        send.wait()
        comm.barrier()


def large_messages_cross_without_deadlock(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    incoming = np.empty(1 << 20, np.float32)
    outgoing = np.full(1 << 20, comm.rank, np.float32)
    receive, send = comm.irecv(incoming, left), comm.isend(outgoing, right)
    while not receive.test():
        pass
    send.wait()
    assert (incoming == left).all()


def splits_order_by_key_and_share_the_ledger(comm: Communicator) -> None:
    part = comm.split(comm.rank % 2, key=-comm.rank)
    assert part is not None
    members = [rank for rank in reversed(range(comm.size)) if rank % 2 == comm.rank % 2]
    assert part.size == len(members)
    assert members[part.rank] == comm.rank
    assert part.topology == comm.topology.subset(members)
    assert part.ledger is comm.ledger
    total = np.array([comm.rank])
    part.allreduce(total)
    assert total[0] == sum(members)
    alone = comm.split(0 if comm.rank == 0 else None)
    assert (alone is not None) == (comm.rank == 0)
    if alone is not None:
        assert alone.size == 1
        alone.barrier()


def node_and_cross_follow_the_topology(comm: Communicator) -> None:
    topology, rank = comm.topology, comm.rank
    node, cross = comm.node(), comm.cross()
    assert comm.node() is node
    assert comm.cross() is cross
    assert node.size == len(topology.ranks_on(topology.node_of[rank]))
    assert node.rank == topology.local_rank(rank)
    assert node.topology.n_nodes == 1
    assert node.topology.hosts[node.rank] == topology.hosts[rank]
    peers = [r for r in range(comm.size) if topology.local_rank(r) == topology.local_rank(rank)]
    assert cross.topology == topology.subset(peers)
    assert peers[cross.rank] == rank
    total = np.array([1])
    node.allreduce(total)
    cross.allreduce(total)
    assert total[0] == sum(len(topology.ranks_on(topology.node_of[peer])) for peer in peers)


def a_window_is_seen_by_the_whole_node(comm: Communicator) -> None:
    node = comm.node()
    window = node.window(8 * node.rank)
    assert [part.size for part in window.slices] == [8 * rank for rank in range(node.size)]
    window.slices[node.rank][:] = node.rank + 1
    window.fence()
    for rank, part in enumerate(window.slices):
        assert (part == rank + 1).all()
    window.fence()
    if node.size > 1 and node.rank == 0:
        window.slices[1][:] = 77
    window.fence()
    assert node.size == 1 or (window.slices[1] == 77).all()
    window.close()
    if comm.topology.n_nodes > 1:
        with pytest.raises(BackendError, match="one node"):
            comm.window(8)
    comm.barrier()


def mailboxes_deliver_in_order_without_waiting(comm: Communicator) -> None:
    box = comm.mailbox()
    assert box.poll() == []
    comm.barrier()
    rounds = 5
    for number in range(rounds):
        for dest in range(comm.size):
            payload = np.array([comm.rank, number], np.int64)
            box.post(dest, payload)
            payload[:] = -1  # the mailbox sends a copy
    received: list[tuple[int, np.ndarray]] = []
    deadline_s = time.monotonic() + 60
    while len(received) < rounds * comm.size:
        received += box.poll()
        assert time.monotonic() < deadline_s
    assert box.drain() == []
    numbers: dict[int, list[int]] = {}
    for source, payload in received:
        assert payload.dtype == np.uint8
        rank, number = payload.view(np.int64)
        assert rank == source
        numbers.setdefault(source, []).append(int(number))
    assert numbers == {rank: list(range(rounds)) for rank in range(comm.size)}


def drain_brings_what_was_posted_before(comm: Communicator) -> None:
    box = comm.mailbox()
    for dest in range(comm.size):
        for length in (0, 10, 300_000)[: 1 + (comm.rank + dest) % 3]:
            box.post(dest, np.full(length, comm.rank, np.uint8))
    messages = box.drain()
    expected = {rank: [0, 10, 300_000][: 1 + (comm.rank + rank) % 3] for rank in range(comm.size)}
    arrived: dict[int, list[int]] = {}
    for source, payload in messages:
        assert (payload == source).all()
        arrived.setdefault(source, []).append(payload.size)
    assert arrived == expected
    assert box.drain() == []


def the_ledger_holds_the_stated_formulas(comm: Communicator) -> None:
    rank, size, topology = comm.rank, comm.size, comm.topology

    def spent(action: Callable[[], object]) -> tuple[int, int]:
        before = sent(comm)
        action()
        after = sent(comm)
        return after[0] - before[0], after[1] - before[1]

    right = (rank + 1) % size
    nbytes = 4000
    ring = 2 * (size - 1) * nbytes // size
    inside = topology.same_node(rank, right)
    buffer = np.zeros(1000, np.float32)
    expected = (ring, 0) if inside else (0, ring)
    assert spent(lambda: comm.allreduce(buffer)) == expected
    assert spent(lambda: comm.iallreduce(buffer).wait()) == expected
    around = (size - 1) * nbytes
    gathered = np.empty(1000 * size, np.float32)
    assert spent(lambda: comm.iallgather(buffer, gathered).wait()) == (
        (around, 0) if inside else (0, around)
    )
    mates = len(topology.ranks_on(topology.node_of[rank])) - 1
    slices = np.zeros(10 * size, np.float32)
    assert spent(lambda: comm.ialltoall(slices, slices.copy()).wait()) == (
        40 * mates,
        40 * (size - 1 - mates),
    )
    parts = [10 * other for other in range(size)]
    passed = sum(parts) - parts[right] + 8 * (size - 1)
    if size > 1:
        assert spent(lambda: comm.allgather_bytes(bytes(10 * rank))) == (
            (passed, 0) if inside else (0, passed)
        )
    assert comm.ledger.source == "formula"
    assert spent(comm.barrier) == (0, 0)


def seconds_are_counted_once(comm: Communicator) -> None:
    began_s, before_s = time.perf_counter(), comm.ledger.seconds
    for _ in range(3):
        comm.broadcast(np.zeros(10_000), 0, 4096)
        comm.allreduce(np.zeros(1000))
        comm.allgather_bytes(b"x")
    elapsed_s = time.perf_counter() - began_s
    counted_s = comm.ledger.seconds - before_s
    assert 0 < counted_s <= elapsed_s


CHECKS: list[Callable[[Communicator], None]] = [
    sums_are_exact_for_every_dtype_and_length,
    maxima_and_minima,
    sums_have_the_same_bits_on_all_ranks,
    half_precision_and_strided_buffers_are_refused,
    non_blocking_collectives_complete_in_any_order,
    empty_payloads_are_legal,
    gathered_bytes_may_differ_in_length,
    broadcasts_reach_all_from_every_root,
    a_broadcast_crosses_each_link_once,
    messages_keep_their_order_and_their_tag,
    a_message_must_fill_its_buffer,
    large_messages_cross_without_deadlock,
    splits_order_by_key_and_share_the_ledger,
    node_and_cross_follow_the_topology,
    a_window_is_seen_by_the_whole_node,
    mailboxes_deliver_in_order_without_waiting,
    drain_brings_what_was_posted_before,
    the_ledger_holds_the_stated_formulas,
    seconds_are_counted_once,
]
