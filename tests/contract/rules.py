"""Every rule against its textbook recursion, written out in NumPy over all replicas at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import Sgd
from hpctrain.sync.average import Average
from hpctrain.sync.elastic import Elastic
from hpctrain.sync.fedaware import FedAware
from hpctrain.sync.gossip import Gossip
from hpctrain.sync.leader import Leader
from hpctrain.sync.members import Members
from hpctrain.sync.minnorm import min_norm_weights
from hpctrain.sync.mixing import mixing_matrix
from hpctrain.sync.outer import Nesterov, SlowMo
from hpctrain.sync.payload import Payload
from hpctrain.sync.qsparse import Qsparse
from hpctrain.sync.rule import Ground, Moment
from hpctrain.sync.rules import Rules, Running
from hpctrain.sync.table import RuleTable
from hpctrain.sync.trigger import Elapsed
from hpctrain.transport.communicator import Communicator

N, STEPS, LR = 7, 12, 0.1


def gradient(rank: int, step: int, x_N: np.ndarray) -> np.ndarray:
    """Of a quadratic whose minimum differs from replica to replica, plus noise."""
    noise = np.random.default_rng([rank, step]).normal(size=x_N.shape)
    return x_N - np.cos(rank + np.arange(len(x_N))) + 0.3 * noise


def loss(rank: int, step: int) -> float:
    return float(np.random.default_rng([17, rank, step]).uniform())


def start_N() -> np.ndarray:
    return np.random.default_rng(5).normal(size=N)


def make_model(dtype: torch.dtype = torch.float64) -> FlatModel:
    module = nn.Linear(N, 1, bias=False, dtype=dtype)
    module.weight.data[:] = torch.from_numpy(start_N())
    return FlatModel(module)


def train(
    comm: Communicator,
    rules: list[RuleTable],
    groups: list[list[int]],
    rank: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    """(STEPS, N): this rank's parameters after each step, with the gradients of `rank`."""
    rank = comm.rank if rank is None else rank
    flat = make_model(dtype)
    sgd = Sgd().build(flat)
    running = []
    for number, (config, group_of) in enumerate(zip(rules, groups, strict=True)):
        alone = comm.split(comm.rank, 0)
        payload = Payload(flat, {}, alone, config.buffers, config.momentum)
        members = Members(comm, range(comm.size), group_of, payload.size)
        ground = Ground(members, payload, gradient_norm=flat.grad_norm)
        running.append(Running(f"{number}", config.build(ground), payload))
    sync = Rules(running)
    seen = np.empty((STEPS, N))
    for step in range(1, STEPS + 1):
        x_N = flat.params_P.numpy()
        flat.grads_P.copy_(torch.from_numpy(gradient(rank, step, x_N)))
        at = Moment(Elapsed(step, step / STEPS), LR, loss(rank, step), 1)
        sync.before_update(at)
        sgd.step(LR)
        sync.after_update(at)
        seen[step - 1] = x_N
    return seen


Recursion = Callable[[np.ndarray, int, dict[str, np.ndarray]], None]
"""(x_MN after the update or before it, step, memory): reconciles x_MN in place."""


@dataclass(frozen=True)
class Case:
    rule: RuleTable
    recursion: Recursion
    before: bool = False
    dtype: torch.dtype = torch.float64


def textbook(case: Case, size: int) -> np.ndarray:
    """(STEPS, size, N)."""
    x_MN = np.tile(start_N(), (size, 1))
    memory: dict[str, np.ndarray] = {}
    seen = np.empty((STEPS, size, N))
    for step in range(1, STEPS + 1):
        grads_MN = np.stack([gradient(rank, step, x_MN[rank]) for rank in range(size)])
        if case.before:
            case.recursion(x_MN, step, memory)
        x_MN -= LR * grads_MN
        if not case.before:
            case.recursion(x_MN, step, memory)
        seen[step - 1] = x_MN
    return seen


def local_sgd(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
    if step % 3 == 0:
        x_MN[:] = x_MN.mean(0)


def post_local(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
    if step <= STEPS // 2 or (step - STEPS // 2) % 2 == 0:
        x_MN[:] = x_MN.mean(0)


def slowmo(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
    if step % 3 == 0:
        start = memory.setdefault("start", start_N())
        u = memory.setdefault("u", np.zeros(N))
        u[:] = 0.6 * u + (start - x_MN.mean(0)) / LR
        start -= 0.9 * LR * u
        x_MN[:] = start


def diloco(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
    if step % 4 == 0:
        start = memory.setdefault("start", start_N())
        u = memory.setdefault("u", np.zeros(N))
        delta = start - x_MN.mean(0)
        u[:] = 0.9 * u + delta
        start -= 0.7 * (delta + 0.9 * u)
        x_MN[:] = start


def grawa(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
    before_MN = memory.setdefault("before", np.tile(start_N(), (len(x_MN), 1)))
    if step % 2 == 0:
        norms = [np.linalg.norm(gradient(r, step, before_MN[r])) for r in range(len(x_MN))]
        first = "ema" not in memory
        ema = memory.setdefault("ema", np.array(norms))
        if not first:
            ema[:] = 0.9**8 * ema + (1 - 0.9**8) * np.array(norms)
        w = (1 / ema) / (1 / ema).sum()
        x_MN += 0.5 * (w @ x_MN - x_MN)
    before_MN[:] = x_MN


def lsgd(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
    if step % 3 == 0:
        scores = [
            np.mean([loss(r, s) for s in range(max(1, step - 4), step + 1)])
            for r in range(len(x_MN))
        ]
        leader = x_MN[int(np.argmin(scores))].copy()
        x_MN += 0.3 * (leader - x_MN)


def easgd(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
    if step % 2 == 0 and len(x_MN) > 1:
        c = memory.setdefault("c", start_N())
        mean = x_MN.mean(0)
        x_MN -= 0.8 / len(x_MN) * (x_MN - c)
        c += 0.8 * (mean - c)


def dsgd(graph: str) -> Recursion:
    def mix(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
        x_MN[:] = mixing_matrix(graph, len(x_MN), step - 1) @ x_MN

    return mix


def fedaware(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
    if step % 3 == 0 and len(x_MN) > 1:
        start = memory.setdefault("start", start_N())
        m = memory.setdefault("m", np.zeros_like(x_MN))
        delta = start - x_MN
        m[:] = 0.5 * m + 0.5 * delta
        u = m / np.linalg.norm(m, axis=1, keepdims=True)
        d = min_norm_weights(u @ u.T) @ u
        start -= np.linalg.norm(delta, axis=1).mean() * d
        x_MN[:] = start


def qsparse(density: float) -> Recursion:
    def exchange(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
        if step % 2 or len(x_MN) == 1:
            return
        centre = memory.setdefault("centre", start_N())
        m_MN = memory.setdefault("m", np.zeros_like(x_MN))
        m_MN += centre - x_MN
        sent_MN = np.zeros_like(x_MN)
        for m, sent in zip(m_MN, sent_MN, strict=True):
            largest = np.argsort(-abs(m))[: int(np.ceil(density * N))]
            sent[largest] = m[largest]
        m_MN -= sent_MN
        centre -= sent_MN.mean(0)
        x_MN[:] = centre

    return exchange


CASES = {
    "average": Case(Average(every=3), local_sgd),
    "average, schedule": Case(Average(schedule=[[0, 1], [0.55, 2]]), post_local),
    "average, slowmo": Case(Average(every=3, outer=SlowMo(lr=0.9, momentum=0.6)), slowmo),
    "average, nesterov": Case(Average(every=4, outer=Nesterov()), diloco),
    "average, grawa": Case(Average(every=2, pull=0.5, weights="inverse_gradient_norm"), grawa),
    "leader": Case(Leader(every=3, pull=0.3, window=5), lsgd),
    "elastic": Case(Elastic(every=2, beta=0.8), easgd, before=True),
    "gossip, ring": Case(Gossip(graph="ring"), dsgd("ring"), before=True),
    "gossip, grid": Case(Gossip(graph="grid"), dsgd("grid"), before=True),
    "gossip, exponential": Case(Gossip(graph="exponential", order="after"), dsgd("exponential")),
    "gossip, one_peer": Case(Gossip(), dsgd("one_peer"), before=True),
    "gossip, full": Case(Gossip(graph="full"), dsgd("full"), before=True),
    "fedaware": Case(FedAware(every=3), fedaware),
    "qsparse": Case(
        Qsparse(every=2, density=0.4, value="float32"), qsparse(0.4), dtype=torch.float32
    ),
}


def equals_textbook(comm: Communicator, case: Case) -> None:
    """Collective. Every step of every rank is the recursion's."""
    seen = train(comm, [case.rule], [[0] * comm.size], dtype=case.dtype)
    expected = textbook(case, comm.size)[:, comm.rank]
    rtol = 1e-9 if case.dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(seen, expected, rtol=rtol, atol=1e-3 * rtol)


def two_levels(comm: Communicator) -> None:
    """Collective. Averages of neighbours at every second step and of all at every sixth."""
    groups = [rank // 2 for rank in range(comm.size)]
    near, far = Average(every=2), Average(every=6)
    seen = train(comm, [near, far], [groups, [0] * comm.size])

    def recursion(x_MN: np.ndarray, step: int, memory: dict[str, np.ndarray]) -> None:
        if step % 2 == 0:
            for group in set(groups):
                members = [rank for rank, number in enumerate(groups) if number == group]
                x_MN[members] = x_MN[members].mean(0)
        if step % 6 == 0:
            x_MN[:] = x_MN.mean(0)

    expected = textbook(Case(near, recursion), comm.size)[:, comm.rank]
    np.testing.assert_allclose(seen, expected, rtol=1e-9, atol=1e-12)


def one_rank_is_a_no_op(
    comm: Communicator, config: RuleTable, dtype: torch.dtype = torch.float64
) -> None:
    """Collective. With one replica a rule without an outer optimiser changes nothing."""
    alone = comm.split(comm.rank)
    assert alone is not None
    seen = train(alone, [config], [[0]], rank=comm.rank, dtype=dtype)
    plain = train(alone, [], [], rank=comm.rank, dtype=dtype)
    np.testing.assert_array_equal(seen, plain)
