"""The problems of benchmarks/noise_scale.py: one pass gives what autograd gives by sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.noise_problems import Logistic, Network, truth
from hpctrain.data.spec import Spec
from hpctrain.models.cnn import Cnn
from hpctrain.models.mlp import Mlp


def logistic():
    torch.manual_seed(0)
    problem = Logistic(torch.randn(12, 5), torch.randint(2, (12,)).float())
    return (
        problem,
        torch.randn(5),
        lambda w: -F.logsigmoid((2 * problem.labels_N - 1) * (problem.rows_ND @ w)),
    )


def network(model, shape):
    torch.manual_seed(0)
    spec = Spec("classification", shape, "float32", 3)
    problem = Network(model, spec, torch.randn(12, *shape), torch.randint(3, (12,)))

    def losses(w):
        names = [name for name, _ in problem.module.named_parameters()]
        sizes = [p.numel() for p in problem.module.parameters()]
        parts = zip(names, problem.module.parameters(), w.split(sizes), strict=True)
        given = {name: part.view(p.shape) for name, p, part in parts}
        outputs = torch.func.functional_call(problem.module, given, (problem.inputs,))
        return F.cross_entropy(outputs, problem.labels_N, reduction="none")

    return problem, problem.start(3), losses


@pytest.mark.parametrize(
    "case",
    [
        logistic,
        lambda: network(Mlp(widths=[7]), (6,)),
        lambda: network(Cnn(channels=[2, 3], hidden=5), (1, 8, 8)),
    ],
    ids=["logistic", "mlp", "cnn"],
)
def test_gradients_and_norms_are_those_of_autograd(case):
    problem, params_P, losses = case()
    each_NP = torch.autograd.functional.jacobian(losses, params_P)
    index_KB = torch.tensor([[0, 3, 5], [7, 2, 11]])
    gradients_KP, norms_KB = problem.pass_over(params_P, index_KB)
    torch.testing.assert_close(gradients_KP.detach(), each_NP[index_KB].mean(1))
    torch.testing.assert_close(norms_KB.detach(), (each_NP**2).sum(1)[index_KB])
    s2, mu2 = truth(problem, params_P, chunk=5)
    mean_P = each_NP.mean(0)
    assert mu2 == pytest.approx(float(mean_P @ mean_P), rel=1e-4)
    assert s2 == pytest.approx(float(((each_NP - mean_P) ** 2).sum(1).mean()), rel=1e-4)
