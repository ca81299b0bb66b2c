"""Error feedback of tensors follows the same rule; whole exchanges that use it, run on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.compress.feedback import Feedback, LocalRule
from hpctrain.compress.feedback_device import DeviceFeedback
from hpctrain.compress.select import Selector
from hpctrain.exchange.apply import Target
from hpctrain.exchange.setting import Setting
from hpctrain.exchange.topk import Topk
from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import Sgd
from hpctrain.transport.threads import run_threads

N, K = 2_000, 20
RULES = [
    LocalRule(),
    LocalRule(momentum=0.9, nesterov=True, weight_decay=0.01, clips=True),
    LocalRule(momentum=0.9, feedback=False),
    LocalRule(momentum=0.9, masking=True),
]


@pytest.mark.parametrize("rule", RULES)
def test_it_follows_the_rule_of_the_host(rule):
    rng = np.random.default_rng(1)
    params_N = rng.standard_normal(N).astype(np.float32)
    grad_N = np.zeros(N, np.float32)
    tensor_N = torch.zeros(N)
    host = Feedback(rule, grad_N, [], params_N)
    device = DeviceFeedback(
        rule, tensor_N, torch.from_numpy(params_N), np.zeros(N, np.float32), waits=True
    )
    selector = Selector(N)
    for step in range(12):
        fresh_N = rng.standard_normal(N).astype(np.float32)
        grad_N[:] = fresh_N
        tensor_N.copy_(torch.from_numpy(fresh_N))
        for feedback in (host, device):
            feedback.begin(0.1 + 0.01 * step, 0.7)
            picked = feedback.pick(selector, K)
            assert picked.finite
            feedback.take(picked.indices_K, picked.values_K * np.float32(0.99))
            if step != 5:
                feedback.commit(sent_all=step == 8)
        for mine, theirs in zip(host.stored(), device.stored(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
        assert device.residual_sq == pytest.approx(host.residual_sq, rel=1e-4)


def test_values_that_are_not_finite_are_seen():
    tensor_N = torch.zeros(N)
    tensor_N[3] = torch.nan
    feedback = DeviceFeedback(
        LocalRule(), tensor_N, torch.zeros(N), np.zeros(N, np.float32), waits=True
    )
    feedback.begin(1.0)
    assert not feedback.pick(Selector(N), K).finite
    assert not feedback.prepare_all()


@pytest.mark.parametrize("algorithm", ["gather", "exclusive", "owner"])
@pytest.mark.parametrize("gives", ["update", "gradient"])
def test_an_exchange_of_tensors_equals_that_of_the_host(algorithm, gives, monkeypatch):
    def rank_program(comm):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 40), nn.Linear(40, 3))
        config = Topk(
            density=0.05, algorithm=algorithm, gives=gives, dense_below=200, hierarchy=False
        )
        flat = FlatModel(model, config.comes_last)
        exchange = config.build(Setting(flat, comm, lambda *_: None, Sgd(momentum=0.9)))
        for step in range(4):
            flat.zero_grad()
            exchange.arm(0.1)
            generator = torch.Generator().manual_seed(10 * step + comm.rank)
            flat.module(torch.randn(4, 64, generator=generator)).square().sum().backward()
            assert exchange.finish()
            exchange.settle(keep=True)
        found = flat.params_P.clone(), flat.grads_P.clone()
        residual = exchange.state().tensors["residual"].tensor.clone()
        exchange.close()
        return *found, residual

    expected = run_threads(3, rank_program)
    monkeypatch.setattr(Setting, "on_host", False)
    for host, device in zip(expected, run_threads(3, rank_program), strict=True):
        which = range(3) if gives == "gradient" else (0, 2)
        for position in which:
            torch.testing.assert_close(host[position], device[position], rtol=1e-5, atol=1e-6)


def test_results_reach_a_vector_of_any_device():
    vector_P = torch.zeros(10)
    target = Target(vector_P, "update")
    target._host_P = None  # as on a GPU
    target.take(2, np.array([0, 3]), np.array([1.0, 2.0], np.float32))
    target.take_sum(8, 10, np.ones(2, np.float32))
    assert vector_P.tolist() == [0, 0, -1, 0, 0, -2, 0, 0, -1, -1]
