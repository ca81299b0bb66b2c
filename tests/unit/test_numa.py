"""Ranks by NUMA domain, from a machine that is written down."""

import pytest

from hpctrain.errors import UsageError
from hpctrain.transport.numa import numa_ranks, own_domain
from hpctrain.transport.topology import Topology


@pytest.fixture
def machine(tmp_path):
    for number, cores in enumerate(("0-3,8\n", "4-7,9-11\n", "\n")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(cores)
    return tmp_path


@pytest.mark.parametrize(
    ("cores", "domain"), [({1, 8}, 0), ({4, 5, 10}, 1), ({3, 4}, None), ({12}, None)]
)
def test_domain_that_holds_all_cores(machine, cores, domain):
    assert own_domain(cores, machine) == domain


def test_groups_are_of_node_and_domain():
    topology = Topology.from_labels([0, 1, 0, 1, 0])
    assert numa_ranks([0, 0, 1, 0, 0], topology) == (0, 1, 2, 1, 0)


def test_an_unbound_rank_is_named():
    with pytest.raises(UsageError, match="rank 1 on node0 is not"):
        numa_ranks([0, None], Topology.from_labels([0, 0]))
