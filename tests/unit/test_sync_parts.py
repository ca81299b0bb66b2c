"""The parts of rules: bytes that cross nodes, mixing matrices, least norms, groups, leaders."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpctrain.data.reserve import reserve
from hpctrain.exchange.delayed import DelayedExchange
from hpctrain.models.flat import FlatModel
from hpctrain.sync.fedaware import FedAware
from hpctrain.sync.leader import Leader
from hpctrain.sync.members import Members
from hpctrain.sync.minnorm import min_norm_weights
from hpctrain.sync.mixing import check_mixing, mixing_matrix
from hpctrain.sync.payload import Payload
from hpctrain.sync.rule import Ground, Moment
from hpctrain.sync.trigger import Elapsed
from hpctrain.transport.threads import run_threads

D = 960
"""Entries, divisible by all sizes below; 8 bytes each."""


def inter_bytes(size, node_of, act, replica_of=None):
    """Sum over ranks of the bytes that `act(members, vector)` sends between nodes."""

    def body(comm):
        members = Members(comm, replica_of or range(size), [0] * size, D)
        before = comm.ledger.bytes_sent_inter
        act(members, np.full(D, float(comm.rank)))
        return comm.ledger.bytes_sent_inter - before

    return sum(run_threads(size, body, node_of=node_of))


@pytest.mark.parametrize("node_of", [[0, 1], [0, 1, 2, 3], [0, 0, 1, 1], [0, 1, 0, 1, 2, 2]])
class TestBytes:
    def test_an_average_sends_twice_a_leader(self, node_of):
        size, nodes = len(node_of), max(node_of) + 1
        mean = inter_bytes(size, node_of, lambda members, x: members.mean(x))
        lead = inter_bytes(size, node_of, lambda members, x: members.broadcast(x, size - 1))
        assert mean == 2 * (nodes - 1) * D * 8
        assert lead == (nodes - 1) * D * 8

    def test_a_node_that_is_one_replica_sends_its_vector_once(self, node_of):
        nodes = max(node_of) + 1
        mean = inter_bytes(len(node_of), node_of, lambda m, x: m.mean(x), node_of)
        lead = inter_bytes(len(node_of), node_of, lambda m, x: m.broadcast(x, 0), node_of)
        assert mean == 2 * (nodes - 1) * D * 8
        assert lead == (nodes - 1) * D * 8


@pytest.mark.parametrize("node_of", [[0], [0, 0, 0], [0, 1, 1], [0, 1, 0, 1, 1], [0, 0, 1, 1]])
@pytest.mark.parametrize("by_node", [False, True])
def test_verbs_do_what_they_say(node_of, by_node):
    size = len(node_of)
    replica_of = node_of if by_node else list(range(size))
    count = max(replica_of) + 1

    def body(comm):
        members = Members(comm, replica_of, [0] * size, 7)
        mine = replica_of[comm.rank]
        x = np.arange(7.0) + 10.0 * mine
        mean = x.copy()
        members.mean(mean)
        np.testing.assert_allclose(mean, np.arange(7.0) + 5.0 * (count - 1))
        led = x.copy()
        members.broadcast(led, count - 1)
        np.testing.assert_array_equal(led, np.arange(7.0) + 10.0 * (count - 1))
        said = members.gather([mine, 2.0])
        np.testing.assert_array_equal(said[:, 0], np.arange(count))
        after, before = (mine + 1) % count, (mine - 1) % count
        if count > 1:
            (arrived,) = members.receive(x, [after], [before])
            np.testing.assert_array_equal(arrived, np.arange(7.0) + 10.0 * before)
        rows = members.exchange_pieces(x)
        joined = np.empty(7)
        members.join_pieces(rows.sum(0), joined)
        if members.across is not None:
            told = members.gather_rows(np.array([mine, 3]))
            np.testing.assert_array_equal(told, [[number, 3] for number in range(count)])
        np.testing.assert_allclose(joined, mean * count)
        gram = rows @ rows.T
        members.sum_pieces(gram)
        vectors = np.arange(7.0) + 10.0 * np.arange(count)[:, None]
        np.testing.assert_allclose(gram, vectors @ vectors.T)
        members.close()

    run_threads(size, body, node_of=node_of)


@pytest.mark.parametrize("graph", ["ring", "grid", "exponential", "one_peer", "full"])
@pytest.mark.parametrize("size", range(1, 17))
def test_mixing_matrices_are_doubly_stochastic_and_connect_all(graph, size):
    product = np.eye(size)
    for step in range(3 * size):
        matrix = mixing_matrix(graph, size, step)
        check_mixing(matrix)
        product = matrix @ product
    assert (product > 0).all()


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_one_peer_rounds_average_exactly(size):
    product = np.eye(size)
    for step in range(int(math.log2(size))):
        product = mixing_matrix("one_peer", size, step) @ product
    np.testing.assert_allclose(product, 1.0 / size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_least_norm_is_optimal(count, dimension, seed):
    """At the point p of least norm <p, v_i> >= |p|^2 for all i."""
    v = np.random.default_rng(seed).normal(size=(count, dimension))
    w = min_norm_weights(v @ v.T, tolerance=1e-9, most=20_000)
    p = w @ v
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1.0)
    assert (v @ p).min() >= p @ p - 1e-3 * max(1.0, p @ p)


def elect(losses, vectors, **keys):
    """Every rank's parameters after one election."""
    config = Leader(every=1, pull=0.25, window=1, **keys)

    def body(comm):
        module = nn.Linear(len(vectors[0]), 1, bias=False, dtype=torch.float64)
        module.weight.data[:] = torch.tensor(vectors[comm.rank], dtype=torch.float64)
        flat = FlatModel(module)
        payload = Payload(flat, {}, comm.split(comm.rank, 0))
        members = Members(comm, range(comm.size), [0] * comm.size, payload.size)
        rule = config.build(Ground(members, payload, flat.grad_norm))
        at = Moment(Elapsed(1, 0.0), 0.1, losses[comm.rank], 1)
        rule.observe(at)
        rule.meet(at, payload.pack())
        return flat.params_P.tolist(), rule.tally()["leader"]

    return run_threads(len(losses), body)


@pytest.mark.parametrize("form", ["direction", "projection"])
@pytest.mark.parametrize(
    ("moves", "common"),
    [
        # Of (3, 0) and (0, 4), units at right angles: d = (0.5, 0.5).
        ([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]], [0.5, 0.5]),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
    ],
)
def test_a_replica_without_samples_does_not_stop_the_common_direction(form, moves, common):
    length = 7 / 3  # mean of |delta|, and as it happens <v, d> / <d, d> with v = (1, 4/3)

    def body(comm):
        flat = FlatModel(nn.Linear(2, 1, bias=False, dtype=torch.float64))
        start = flat.params_P.clone()
        members = Members(comm, range(3), [0] * 3, 2)
        payload = Payload(flat, {}, members.inside)
        rule = FedAware(form=form).build(Ground(members, payload, flat.grad_norm))
        flat.params_P.sub_(torch.tensor(moves[comm.rank]))
        rule.meet(Moment(Elapsed(16, 0.0), 0.1, 1.0, 1), payload.pack())
        payload.unpack()
        return (start - flat.params_P).tolist()

    for moved in run_threads(3, body):
        assert moved == pytest.approx([length * share for share in common])


def test_the_leader_keeps_its_parameters_bit_by_bit():
    found = elect([3.0, 1.0, 2.0], [[0.1, 0.7], [0.3, 1e-9], [1e9, -2.0]])
    assert [leader for _, leader in found] == [1, 1, 1]
    assert found[1][0] == [0.3, 1e-9]
    assert found[0][0] == pytest.approx([0.15, 0.525])


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_replica_that_diverged_never_leads_and_is_brought_back(odd):
    by_loss = elect([odd, 5.0], [[1.0], [2.0]])
    assert [leader for _, leader in by_loss] == [1, 1]
    by_parameters = elect([0.0, 5.0], [[odd], [2.0]])
    assert by_parameters[0] == ([2.0], 1)


def test_ties_are_broken_alike_everywhere_and_not_always_for_the_same():
    leaders = set()
    for seed in range(20):
        config = Leader(every=1)

        def body(comm, seed=seed, config=config):
            flat = FlatModel(nn.Linear(1, 1, bias=False))
            members = Members(comm, range(3), [0] * 3, 1)
            payload = Payload(flat, {}, members.inside)
            rule = config.build(Ground(members, payload, flat.grad_norm, seed=seed))
            at = Moment(Elapsed(1, 0.0), 0.1, 1.0, 1)
            rule.observe(at)
            rule.meet(at, flat.params_P.detach())
            return rule.tally()["leader"]

        chosen = set(run_threads(3, body))
        assert len(chosen) == 1
        leaders |= chosen
    assert leaders == {0, 1, 2}


class Numbers:
    nbytes = 0

    def __len__(self):
        return 50

    def batch(self, indices, epoch):
        return torch.from_numpy(indices), torch.from_numpy(indices)

    def labels(self):
        return np.arange(50) % 3


def test_probe_samples_are_nobodys_to_train_on():
    rest, probe = reserve(Numbers(), 10, seed=3)
    trained = rest.batch(np.arange(len(rest)), 0)[0].tolist()
    probed = probe.batch(np.arange(len(probe)), 0)[0].tolist()
    assert len(trained) == 40
    assert sorted(trained + probed) == list(range(50))
    assert (rest.labels() == np.array(trained) % 3).all()


def test_momentum_is_reset_at_meetings_and_not_by_the_drip():
    def body(comm):
        flat = FlatModel(nn.Linear(2, 1, bias=False, dtype=torch.float64))
        flat.params_P.add_(comm.rank)
        memory_P = torch.ones(2, dtype=torch.float64)
        alone = comm.split(comm.rank, 0)
        payload = Payload(flat, {"velocity": memory_P}, alone, momentum="reset")
        members = Members(comm, range(2), [0, 0], payload.size)
        rule = Leader(every=2, drip=0.5).build(Ground(members, payload, flat.grad_norm))
        kept = []
        for step in (1, 2, 3):
            memory_P.fill_(1.0)
            at = Moment(Elapsed(step, 0.0), 0.1, float(comm.rank), 1)
            rule.observe(at)
            if rule.due(at):
                rule.meet(at, payload.pack())
                payload.unpack()
            kept.append(float(memory_P.sum()))
        return kept

    assert run_threads(2, body) == [[2.0, 0.0, 2.0]] * 2


def test_a_delayed_sum_that_is_not_finite_is_told_when_it_arrives():
    def body(comm):
        flat = FlatModel(nn.Linear(2, 1, bias=False))
        exchange = DelayedExchange(flat, comm, delay=1)
        told = []
        for value in (1.0, float("inf"), 1.0):
            flat.grads_P.fill_(value)
            told.append(exchange.finish())
            exchange.settle(keep=told[-1])
        exchange.close()
        return told

    assert run_threads(2, body) == [[True, True, False]] * 2
