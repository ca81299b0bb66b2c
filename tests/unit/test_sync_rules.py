"""Every rule on threads, 1 to 8 ranks: on one node, on two that interleave, on one node each."""

from __future__ import annotations

import pytest

from hpctrain.sync.downpour import Downpour
from hpctrain.sync.elastic import Elastic
from hpctrain.sync.leader import Leader
from hpctrain.transport.threads import run_threads
from tests.contract import rules

POLLED = {
    "downpour": Downpour(),
    "elastic": Elastic(asynchronous=True),
    "leader": Leader(asynchronous=True, every=2),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", rules.CASES)
def test_textbook(name, size):
    case = rules.CASES[name]
    for nodes in ([0] * size, [rank % 2 for rank in range(size)], list(range(size))):
        run_threads(size, lambda comm: rules.equals_textbook(comm, case), node_of=nodes)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_two_levels(size):
    run_threads(size, rules.two_levels, node_of=[rank // 2 for rank in range(size)])


@pytest.mark.parametrize("name", rules.CASES)
def test_one_rank_is_a_no_op(name):
    case = rules.CASES[name]
    if not getattr(case.rule, "outer", None):
        run_threads(2, lambda comm: rules.one_rank_is_a_no_op(comm, case.rule, case.dtype))


@pytest.mark.parametrize("name", POLLED)
def test_one_rank_is_a_no_op_without_meetings(name):
    run_threads(2, lambda comm: rules.one_rank_is_a_no_op(comm, POLLED[name]))
