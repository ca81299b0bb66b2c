"""What every rule sends between nodes: the vector's bytes, equal to the table of docs/sync.md."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.compress.wire import HEADER_BYTES
from hpctrain.models.flat import FlatModel
from hpctrain.sync.average import Average
from hpctrain.sync.downpour import Downpour
from hpctrain.sync.elastic import Elastic
from hpctrain.sync.fedaware import FedAware
from hpctrain.sync.gossip import Gossip
from hpctrain.sync.leader import Leader
from hpctrain.sync.members import Members
from hpctrain.sync.mixing import mixing_matrix
from hpctrain.sync.outer import Nesterov, SlowMo
from hpctrain.sync.payload import Payload
from hpctrain.sync.qsparse import Qsparse
from hpctrain.sync.rule import Ground, Moment
from hpctrain.sync.table import RuleTable
from hpctrain.sync.trigger import Elapsed
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import run_threads

LAYOUTS = [[0, 1], [0, 1, 2, 3], [0, 0, 1, 1], [0, 1, 1, 0]]
SHORT, LONG = 480, 960
"""Entries of 8 bytes; their difference leaves out what does not grow with the model."""

Sent = Callable[[list[int]], float]
"""Node of every rank -> vectors that cross between nodes in one round, all together."""


def links(graph: str) -> Sent:
    """One vector for every neighbour on another node, where a round is one meeting."""

    def sent(node_of: list[int]) -> float:
        weights = mixing_matrix(graph, len(node_of), 0)  # type: ignore[arg-type]
        nodes = np.array(node_of)
        return float(((weights > 0) & (nodes[:, None] != nodes)).sum())

    return sent


def pieces(node_of: list[int]) -> float:
    """A piece of 1 / M from every replica to each one on another node."""
    nodes = np.array(node_of)
    return float((nodes[:, None] != nodes).sum()) / len(node_of)


def ring(node_of: list[int]) -> float:
    """Every piece of 1 / M passes all edges of a ring but the one that leads to its owner."""
    size = len(node_of)
    crossing = sum(node_of[rank] != node_of[(rank + 1) % size] for rank in range(size))
    return crossing * (size - 1) / size


def whole(times: int) -> Sent:
    return lambda node_of: times * max(node_of)


RULES: dict[str, tuple[RuleTable, Sent]] = {
    "leader": (Leader(every=1), whole(1)),
    "average": (Average(every=1), whole(2)),
    "grawa": (Average(every=1, weights="inverse_gradient_norm"), whole(2)),
    "slowmo": (Average(every=1, outer=SlowMo()), whole(2)),
    "diloco": (Average(every=1, outer=Nesterov()), whole(2)),
    "elastic": (Elastic(every=1), whole(2)),
    "gossip, full": (Gossip(graph="full"), whole(2)),
    "gossip, ring": (Gossip(graph="ring"), links("ring")),
    "gossip, one peer": (Gossip(graph="one_peer"), links("one_peer")),
}


def rule_of(config: RuleTable, comm: Communicator, n: int) -> tuple[FlatModel, Ground]:
    dtype = torch.float32 if isinstance(config, Qsparse) else torch.float64
    module = nn.Linear(n, 1, bias=False, dtype=dtype)
    torch.nn.init.constant_(module.weight, 1.0 + comm.rank)
    flat = FlatModel(module)
    flat.grads_P.fill_(1.0)
    alone = comm.split(comm.rank, 0)
    assert alone is not None
    payload = Payload(flat, {}, alone)
    members = Members(comm, range(comm.size), [0] * comm.size, payload.size)
    return flat, Ground(members, payload, flat.grad_norm)


def sent_by_a_meeting(config: RuleTable, node_of: list[int], n: int) -> int:
    def body(comm: Communicator) -> int:
        _, ground = rule_of(config, comm, n)
        rule = config.build(ground)  # type: ignore[attr-defined]
        at = Moment(Elapsed(1, 0.0), 0.1, 1.0, 1)
        rule.observe(at)
        before = comm.ledger.bytes_sent_inter
        rule.meet(at, ground.payload.pack())
        return comm.ledger.bytes_sent_inter - before

    return sum(run_threads(len(node_of), body, node_of=node_of))


@pytest.mark.parametrize("node_of", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_meeting(name: str, node_of: list[int]) -> None:
    config, sent = RULES[name]
    config = config.model_copy(update={"measure_every": 0} if "gossip" in name else {})
    short, long = (sent_by_a_meeting(config, node_of, n) for n in (SHORT, LONG))
    assert long - short == sent(node_of) * (LONG - SHORT) * 8
    assert short - sent(node_of) * SHORT * 8 < 512


@pytest.mark.parametrize("form", ["direction", "projection"])
@pytest.mark.parametrize("node_of", LAYOUTS, ids=str)
def test_fedaware(form: str, node_of: list[int]) -> None:
    """An all-to-all, an all-gather, and for the projection an average."""
    config = FedAware(every=1, form=form)  # type: ignore[arg-type]
    short, long = (sent_by_a_meeting(config, node_of, n) for n in (SHORT, LONG))
    average = 2 * max(node_of) if form == "projection" else 0
    vectors = pieces(node_of) + ring(node_of) + average
    assert long - short == vectors * (LONG - SHORT) * 8


@pytest.mark.parametrize("node_of", LAYOUTS, ids=str)
def test_qsparse(node_of: list[int]) -> None:
    """Every replica's picked entries pass all edges of a ring but one, 4 bytes each."""
    config, rows = Qsparse(every=1, density=0.1), ring(node_of) * len(node_of)
    short, long = (sent_by_a_meeting(config, node_of, n) for n in (SHORT, LONG))
    assert long - short == rows * (LONG - SHORT) // 10 * 4
    assert short - rows * (SHORT // 10 * 4 + HEADER_BYTES) < 256


@pytest.mark.parametrize("node_of", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["leader", "elastic", "downpour"])
def test_an_asynchronous_exchange(name: str, node_of: list[int]) -> None:
    """A pull takes one vector; a centre's exchange brings all pieces of it and takes all back."""
    config: RuleTable = {
        "leader": Leader(every=2, asynchronous=True),
        "elastic": Elastic(every=2, asynchronous=True),
        "downpour": Downpour(every=2),
    }[name]

    def body(n: int) -> Callable[[Communicator], tuple[int, float]]:
        def ranked(comm: Communicator) -> tuple[int, float]:
            _, ground = rule_of(config, comm, n)
            rule = config.build(ground)  # type: ignore[attr-defined]
            before = comm.ledger.bytes_sent_inter
            for step in range(1, 9):  # one exchange is asked for every two steps
                rule.observe(Moment(Elapsed(step, 0.0), 0.1, 1.0 + comm.rank, 1))
                comm.barrier()
            tally = rule.tally()
            return comm.ledger.bytes_sent_inter - before, tally.get("pulls", tally.get("exchanges"))

        return ranked

    short, long = (run_threads(len(node_of), body(n), node_of=node_of) for n in (SHORT, LONG))
    assert [made for _, made in short] == [made for _, made in long]
    vectors = (sum(b for b, _ in long) - sum(b for b, _ in short)) / ((LONG - SHORT) * 8)
    nodes = np.array(node_of)
    elsewhere = (nodes[:, None] != nodes).sum(1)
    made = np.array([made for _, made in long])
    assert made.sum() > 0
    if name == "leader":  # all follow rank 0
        assert vectors == (made * (nodes != nodes[0])).sum()
    elif name == "elastic":
        assert vectors == (made * 2 * elsewhere / len(node_of)).sum()
    else:  # every question comes with a push; the last answers are still on their way
        assert vectors == ((made + (made + 1)) * elsewhere / len(node_of)).sum()
