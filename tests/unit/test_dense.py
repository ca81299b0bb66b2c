"""The dense exchange on threads: the sum over ranks, whatever backward does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.exchange.dense import Dense, DenseExchange, buckets_of
from hpctrain.models.flat import FlatModel
from hpctrain.transport.threads import ThreadReducer, run_threads

SIZES = [1, 2, 3, 4, 8]


def make(seed: int = 0, unused: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    if unused:
        layers.register_parameter("idle", nn.Parameter(torch.ones(7)))
    return layers.double()


def make_exchange(config: Dense, flat: FlatModel, comm) -> DenseExchange:
    buckets = buckets_of(config, flat)
    reducer = ThreadReducer(comm, names=[bucket.name for bucket in buckets])
    return DenseExchange(flat, buckets, reducer)


def inputs_of(rank: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).double()


def expected_sum(size: int, skip: int | None = None, unused: bool = False) -> np.ndarray:
    total = None
    for rank in range(size):
        flat = FlatModel(make(unused=unused))
        if rank != skip:
            flat.module(inputs_of(rank)).square().sum().backward()
        total = flat.grads_P.clone() if total is None else total + flat.grads_P
    assert total is not None
    return total.numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bucket_mib", [1e-5, 1e-4, 4.0])
def test_finish_leaves_the_sum_on_every_rank(size, bucket_mib):
    def rank_program(comm):
        flat = FlatModel(make())
        exchange = make_exchange(Dense(bucket_mib=bucket_mib), flat, comm)
        for _ in range(2):  # the second step must not remember the first
            flat.zero_grad()
            exchange.arm()
            flat.module(inputs_of(comm.rank)).square().sum().backward()
            exchange.finish()
        exchange.close()
        return flat.grads_P.numpy().copy()

    results = run_threads(size, rank_program)
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    np.testing.assert_allclose(results[0], expected_sum(size), rtol=1e-12)


def test_rank_without_samples_and_unused_parameters_take_part():
    def rank_program(comm):
        flat = FlatModel(make(unused=True))
        exchange = make_exchange(Dense(bucket_mib=1e-5), flat, comm)
        if comm.rank != 1:
            exchange.arm()
            flat.module(inputs_of(comm.rank)).square().sum().backward()
        exchange.finish()
        exchange.close()
        return flat.grads_P.numpy().copy()

    for result in run_threads(3, rank_program):
        np.testing.assert_allclose(result, expected_sum(3, skip=1, unused=True), rtol=1e-12)


def test_only_the_last_backward_of_a_step_exchanges():
    def rank_program(comm):
        flat = FlatModel(make())
        exchange = make_exchange(Dense(), flat, comm)
        for part in inputs_of(comm.rank).split(1):
            last = part is not None and torch.equal(part, inputs_of(comm.rank)[-1:])
            if last:
                exchange.arm()
            flat.module(part).square().sum().backward()
        exchange.finish()
        exchange.close()
        return flat.grads_P.numpy().copy()

    for result in run_threads(2, rank_program):
        np.testing.assert_allclose(result, expected_sum(2), rtol=1e-12)


def test_gradients_set_to_none_are_adopted():
    def rank_program(comm):
        module = make()
        flat = FlatModel(module)
        exchange = make_exchange(Dense(), flat, comm)
        module.zero_grad(set_to_none=True)
        exchange.arm()
        module(inputs_of(comm.rank)).square().sum().backward()
        exchange.finish()
        exchange.close()
        assert all(flat.owns_gradient(p) for p in flat.parameters)
        return flat.grads_P.numpy().copy()

    for result in run_threads(2, rank_program):
        np.testing.assert_allclose(result, expected_sum(2), rtol=1e-12)


def test_closed_exchange_leaves_no_hooks():
    def rank_program(comm):
        flat = FlatModel(make())
        make_exchange(Dense(), flat, comm).close()
        flat.module(inputs_of(comm.rank)).square().sum().backward()
        return flat.grads_P.numpy().copy()

    first, second = run_threads(2, rank_program)
    assert not np.array_equal(first, second)
