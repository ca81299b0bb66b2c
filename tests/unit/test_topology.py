from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.transport.topology import Topology

layouts = st.lists(st.integers(0, 4), min_size=1, max_size=12)


def test_nodes_are_numbered_by_first_appearance() -> None:
    topology = Topology.from_labels(["b", "a", "b", "c"], ["hb", "ha", "hb", "hc"])
    assert topology.node_of == (0, 1, 0, 2)
    assert topology.hosts == ("hb", "ha", "hb", "hc")
    assert (topology.size, topology.n_nodes) == (4, 3)
    assert topology.ranks_on(0) == (0, 2)
    assert [topology.local_rank(rank) for rank in range(4)] == [0, 0, 1, 0]
    assert topology.same_node(0, 2)
    assert not topology.same_node(0, 1)


def test_wrong_numbering_is_refused() -> None:
    with pytest.raises(ValueError, match="first appearance"):
        Topology((1, 0), ("a", "b"))
    with pytest.raises(ValueError, match="host name"):
        Topology((0, 0), ("a",))
    with pytest.raises(ValueError, match="at least one rank"):
        Topology((), ())


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0], "1 rank on 1 node"),
        ([0, 0], "2 ranks on 1 node"),
        ([0, 1, 0], "3 ranks on 2 nodes (2+1)"),
        (list(range(9)), "9 ranks on 9 nodes (1+1+1+1+1+1+1+...)"),
    ],
)
def test_describe(labels: list[int], text: str) -> None:
    assert Topology.from_labels(labels).describe() == text


def test_subset_renumbers_nodes() -> None:
    topology = Topology.from_labels([0, 1, 2, 1], ["a", "b", "c", "b"])
    part = topology.subset([3, 2, 1])
    assert part.node_of == (0, 1, 0)
    assert part.hosts == ("b", "c", "b")


def test_ring_bytes_go_to_the_next_rank() -> None:
    topology = Topology.from_labels([0, 0, 1, 1])
    assert topology.ring_bytes(0, 400) == (600, 0)
    assert topology.ring_bytes(1, 400) == (0, 600)
    assert topology.ring_bytes(3, 400) == (0, 600)
    assert Topology.from_labels([0]).ring_bytes(0, 400) == (0, 0)


@given(layouts, st.integers(0, 1000))
def test_totals_over_ranks(labels: list[int], nbytes: int) -> None:
    topology = Topology.from_labels(labels)
    size = topology.size
    ring = sum(sum(topology.ring_bytes(rank, nbytes * size)) for rank in range(size))
    assert ring == 2 * (size - 1) * nbytes * size
    parts = [nbytes + rank for rank in range(size)]
    gathered = sum(sum(topology.gather_bytes(rank, parts)) for rank in range(size))
    assert gathered == (size - 1) * sum(parts)
    exchanged = sum(sum(topology.alltoall_bytes(rank, nbytes)) for rank in range(size))
    assert exchanged == size * (size - 1) * nbytes


@given(layouts, st.data())
def test_a_broadcast_reaches_every_rank_and_enters_each_node_once(
    labels: list[int], data: st.DataObject
) -> None:
    topology = Topology.from_labels(labels)
    root = data.draw(st.integers(0, topology.size - 1))
    routes = [topology.broadcast_route(rank, root) for rank in range(topology.size)]
    assert routes[root][0] is None
    reached, front = {root}, [root]
    entered = []
    while front:
        rank = front.pop()
        for dest in routes[rank][1]:
            assert routes[dest][0] == rank
            assert dest not in reached
            reached.add(dest)
            front.append(dest)
            if not topology.same_node(rank, dest):
                entered.append(topology.node_of[dest])
    assert reached == set(range(topology.size))
    assert sorted(entered) == sorted(set(range(topology.n_nodes)) - {topology.node_of[root]})
    assert all(len(destinations) <= 2 for _, destinations in routes)


def test_importing_it_loads_neither_torch_nor_mpi() -> None:
    code = (
        "import sys, hpctrain.transport.topology, hpctrain.transport.launcher\n"
        "assert not {'torch', 'mpi4py', 'horovod'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
