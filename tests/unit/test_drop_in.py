"""`hpctrain.attach` on threads: many ranks with uneven shares equal one process with everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hpctrain import attach
from hpctrain.errors import UsageError
from hpctrain.transport.threads import RankError, run_threads

N, STEPS = 12, 5


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (N,), generator=generator)


def vector(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy()


def alone() -> np.ndarray:
    model, optimizer = make()
    for step in range(STEPS):
        inputs, targets = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return vector(model)


def shares(size: int) -> list[slice]:
    """Uneven: rank r takes about twice as much as rank r - 1; some may have nothing."""
    ends = [N * (2 ** (r + 1) - 1) // (2**size - 1) for r in range(size)]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_uneven_shares_equal_the_whole_batch(size):
    def rank_program(comm):
        model, optimizer = make()
        with attach(model, optimizer, comm=comm) as sync:
            assert (sync.rank, sync.size) == (comm.rank, size)
            for step in range(STEPS):
                inputs, targets = (part[shares(size)[comm.rank]] for part in data(step))
                if len(inputs):
                    sync.backward(F.cross_entropy(model(inputs), targets), samples=len(inputs))
                sync.step()
        return vector(model)

    for result in run_threads(size, rank_program):
        np.testing.assert_allclose(result, alone(), rtol=1e-11, atol=1e-14)


def test_accumulation_and_zero_grad_to_none_change_nothing():
    def rank_program(comm):
        model, optimizer = make()
        with attach(model, optimizer, comm=comm) as sync:
            for step in range(STEPS):
                optimizer.zero_grad(set_to_none=True)
                inputs, targets = (part.chunk(2)[comm.rank] for part in data(step))
                with sync.accumulate():
                    sync.backward(F.cross_entropy(model(inputs[:2]), targets[:2]), samples=2)
                rest = len(inputs) - 2
                sync.backward(F.cross_entropy(model(inputs[2:]), targets[2:]), samples=rest)
                sync.step()
        return vector(model)

    for result in run_threads(2, rank_program):
        np.testing.assert_allclose(result, alone(), rtol=1e-11, atol=1e-14)


def test_plain_backward_gives_the_mean_of_the_ranks_means():
    def rank_program(comm):
        model, optimizer = make()
        with attach(model, optimizer, comm=comm) as sync:
            for step in range(STEPS):
                inputs, targets = (part.chunk(3)[comm.rank] for part in data(step))
                F.cross_entropy(model(inputs), targets).backward()
                sync.step()
        return vector(model)

    for result in run_threads(3, rank_program):
        np.testing.assert_allclose(result, alone(), rtol=1e-11, atol=1e-14)


def test_all_ranks_take_rank_0s_parameters():
    def rank_program(comm):
        torch.manual_seed(comm.rank)
        model = nn.Linear(3, 3)
        with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), comm=comm):
            return vector(model)

    first, second = run_threads(2, rank_program)
    np.testing.assert_array_equal(first, second)


def test_an_optimizer_of_other_parameters_is_refused():
    def rank_program(comm):
        model, _ = make()
        with attach(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), comm=comm):
            pass

    with pytest.raises(RankError, match="does not have") as caught:
        run_threads(2, rank_program)
    assert isinstance(caught.value.__cause__, UsageError)
