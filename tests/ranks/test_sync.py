"""Every rule over MPI against its textbook recursion; whole runs, asynchronous ones too."""

from __future__ import annotations

import pytest
from contract import rules

from hpctrain.api import run_on
from hpctrain.assemble import Options, World
from hpctrain.config import from_mapping
from hpctrain.transport.communicator import Communicator
from tests.golden_run import MLP

BASE = MLP | {"batch": {"batch_global": 48}, "exchange": {"kind": "none"}, "lr": {"base": 0.03}}
ASYNCHRONOUS = [
    {"kind": "leader", "every": 4, "asynchronous": True},
    {"kind": "elastic", "every": 4, "asynchronous": True},
    {"kind": "downpour", "every": 2},
    {"kind": "average", "every": 4, "unit": "total_steps"},
]


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("name", rules.CASES)
def test_textbook(name: str, comm: Communicator) -> None:
    rules.equals_textbook(comm, rules.CASES[name])


@pytest.mark.ranks(2, 3, 4)
def test_two_levels(comm: Communicator) -> None:
    rules.two_levels(comm)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("rule", ASYNCHRONOUS, ids=lambda rule: rule["kind"])
def test_asynchronous_runs_end_together(rule, comm, rank_tmp_path):
    tree = BASE | {"sync": [rule], "train": {"steps": 120}}
    outcome = run_on(World(comm), from_mapping(tree), Options(out=rank_tmp_path / "run"))
    assert outcome.complete
    assert outcome.step >= 120
    assert outcome.results["accuracy"] > 0.5


@pytest.mark.ranks(4)
@pytest.mark.parametrize("rule", ASYNCHRONOUS, ids=lambda rule: rule["kind"])
def test_replicas_of_two_ranks_at_their_own_pace(rule, comm, rank_tmp_path):
    exchange = {"kind": "dense", "scope": "group", "dense_backend": "mpi"}
    tree = BASE | {"exchange": exchange, "topology": {"groups": "size:2"}}
    tree |= {"sync": [rule], "train": {"steps": 60}}
    outcome = run_on(World(comm), from_mapping(tree), Options(out=rank_tmp_path / "run"))
    assert outcome.complete
    assert outcome.results["accuracy"] > 0.5
