"""Switches from SLURM's addresses, groups of ranks, and their drawing."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import pytest
from rich.console import Console

from hpctrain.doctor.levels import draw, remarks
from hpctrain.doctor.survey import Survey
from hpctrain.errors import UsageError
from hpctrain.transport.levels import Address, Levels, Switches, find_switches
from hpctrain.transport.topology import Topology

TREE = "switch.switch.node"
NONE = Switches(None, "not asked")


def at(host: str, address: str, pattern: str = TREE, node: str = "") -> Address:
    variables = {
        "SLURM_TOPOLOGY_ADDR": address,
        "SLURM_TOPOLOGY_ADDR_PATTERN": pattern,
        "SLURMD_NODENAME": node or host,
    }
    return Address.of(host, {name: value for name, value in variables.items() if value})


def test_proved_addresses_give_the_switches_of_every_rank() -> None:
    topology = Topology.from_labels([0, 0, 1, 2])
    addresses = [at("n1", "s0.s1.n1")] * 2 + [at("n2", "s0.s1.n2"), at("n3.site", "s0.s2.n3")]
    found = find_switches(addresses, topology)
    assert found == Switches((("s0", "s1"), ("s0", "s1"), ("s0", "s1"), ("s0", "s2")), "")
    assert levels(topology, found).groups("switch") == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("addresses", "reason"),
    [
        ([Address("n1"), Address("n2")], "not set"),
        ([at("n1", "s0.s1.n1"), Address("n2")], "rank 1 on n2: SLURM_TOPOLOGY_ADDR is not set"),
        ([at("n1", "s0.s1.n1", pattern=""), at("n2", "s0.s1.n2")], "PATTERN is not set"),
        ([at("n1", "s0.n1"), at("n2", "s0.n2")], "does not fit"),
        ([at("n1", "n1.s0.s1", "node.switch.switch"), at("n2", "")], "does not fit"),
        # mpirun's ranks with the variables of the node on which the batch script runs
        ([at("n1", "s0.s1.n1"), at("n2", "s0.s1.n1")], "names another node than n2: inherited"),
        ([at("n1", "s0.s1.n1"), at("n2", "s0.s1.n1", node="n1")], "ranks on several nodes"),
    ],
)
def test_anything_else_is_unknown_and_says_why(addresses: list[Address], reason: str) -> None:
    found = find_switches(addresses, Topology.from_labels([0, 1]))
    assert found.above is None
    assert reason in found.reason


def test_the_ranks_of_a_node_must_agree() -> None:
    addresses = [at("n1", "s0.s1.n1"), at("n1", "s0.s2.n1")]
    assert "share a node" in find_switches(addresses, Topology.from_labels([0, 0])).reason


def test_a_flat_network_has_no_switches() -> None:
    found = find_switches(
        [at("n1", "n1", "node"), at("n2", "n2", "node")], Topology((0, 1), ("a",) * 2)
    )
    assert found.above == ((), ())
    assert "no topology plugin" in found.reason


def test_node_names_may_contain_dots_and_differ_from_host_names() -> None:
    address = at("login7", "s0.s1.rack1.n4", node="rack1.n4")
    assert address.parts() == (("s0", "s1"), "rack1.n4")


def levels(
    topology: Topology, switches: Switches = NONE, domains: Sequence[int | None] | None = None
) -> Levels:
    return Levels(topology, switches, tuple(domains or [None] * topology.size))


def test_groups() -> None:
    found = levels(Topology.from_labels([0, 1, 0, 1, 2]))
    assert found.groups("node") == (0, 1, 0, 1, 2)
    assert found.groups("world") == (0,) * 5
    assert found.groups("size:2") == (0, 0, 1, 1, 2)
    assert found.groups("nodes:2") == (0, 0, 0, 0, 1)
    for wrong in ("size:0", "size:", "rack", "size:-1", "nodes:0", "nodes:x"):
        with pytest.raises(UsageError, match="choose node, numa, switch, world, size:N"):
            found.groups(wrong)
    with pytest.raises(UsageError, match="not asked"):
        found.groups("switch")
    with pytest.raises(UsageError, match="rank 0 on"):
        found.groups("numa")
    assert levels(found.topology, NONE, [0, 0, 1, 0, 0]).groups("numa") == (0, 1, 2, 1, 3)


def drawn(found: Levels, rule: str = "node", **options: bool) -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=stream, width=100, color_system=None)
    console.print(draw(found, found.groups(rule), **options))
    stream.seek(0)
    return [line.rstrip() for line in stream.read().splitlines()]


def test_a_drawing_with_two_levels_of_switches() -> None:
    topology = Topology.from_labels([0, 0, 1, 1, 2, 2], ["n1", "n1", "n2", "n2", "n10", "n10"])
    switches = Switches((("s0", "s1"),) * 4 + (("s0", "s2"),) * 2, "")
    assert drawn(levels(topology, switches), "switch") == [
        "6 ranks on 3 nodes (2+2+2), 2 groups",
        "`-- switch s0  3 nodes",
        "    +-- switch s1  2 nodes",
        "    |   +-- n1  ranks 0-1  group 0",
        "    |   `-- n2  ranks 2-3  group 0",
        "    `-- switch s2  1 node",
        "        `-- n10  ranks 4-5  group 1",
    ]


def test_groups_inside_a_node() -> None:
    lines = drawn(levels(Topology.from_labels([0] * 4, ["vm"] * 4)), "size:3")
    assert lines == [
        "4 ranks on 1 node, 2 groups",
        "`-- vm  ranks 0-3  0-2 in group 0; 3 in group 1",
    ]


def test_numa_domains_are_drawn_where_ranks_are_bound_to_several() -> None:
    topology = Topology.from_labels([0] * 4 + [1] * 2, ["n1"] * 4 + ["n2"] * 2)
    assert drawn(levels(topology, NONE, [0, 1, 0, 1, 0, 0]), "numa") == [
        "6 ranks on 2 nodes (4+2), 3 groups",
        "+-- n1  ranks 0-3  0, 2 in group 0; 1, 3 in group 1",
        "|   +-- numa 0  ranks 0, 2  group 0",
        "|   `-- numa 1  ranks 1, 3  group 1",
        "`-- n2  ranks 4-5  group 2",
    ]


def test_a_thousand_ranks_fit_on_a_screen() -> None:
    found = levels(Topology.from_labels([rank // 4 for rank in range(1000)]))
    lines = drawn(found)
    assert len(lines) == 1 + 4 + 1 + 4
    assert "... 242 more nodes, ranks 16-983 (--full draws them)" in lines[5]
    assert "node249  ranks 996-999  group 249" in lines[-1]
    assert len(drawn(found, full=True)) == 251


def test_json_of_a_survey() -> None:
    topology = Topology.from_labels([0, 1, 0], ["a", "b", "a"])
    addresses = [at("a", "s0.s1.a"), at("b", "s0.s2.b"), at("a", "s0.s1.a")]
    found = levels(topology, find_switches(addresses, topology), [0, None, 1])
    content = json.loads(Survey(found, found.groups("node")).to_json())
    node = {"host": "a", "ranks": [0, 2], "switches": ["s0", "s1"], "numa": [0, 1]}
    assert content["nodes"][0] == node
    assert content["groups"] == [[0, 2], [1]]
    assert content["switches_unknown"] is None
    found = levels(topology, find_switches([Address("a")] * 3, topology))
    unknown = json.loads(Survey(found, found.groups("node")).to_json())
    assert "not set" in unknown["switches_unknown"]
    assert unknown["nodes"][0]["switches"] is None


def test_remarks() -> None:
    assert "mpirun" in remarks(Topology((0,), ("a",)), NONE)[0]
    assert remarks(Topology((0, 1), ("a", "b")), NONE) == ["Switches unknown: not asked."]
    assert remarks(Topology((0, 0), ("a", "a")), NONE) == []
