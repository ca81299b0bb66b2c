"""How the training loss L looks around the average w of all replicas.

    top_eigenvalue     of the Hessian of L at w, by power iteration on Hessian-vector products
    rise_isotropic     mean over e of L(w + e) - L(w), e ~ N(0, (r |w|)^2 / P I), r = 0.1
    rise_own           the same for e ~ N(0, Xi), Xi = mean of (w_j - w)(w_j - w)^T over replicas
    rise_own_isotropic the same for isotropic e with E |e|^2 = trace of Xi

The first two compare models of all systems; the last two need replicas that differ. All over the
whole training set; draws come in pairs e and -e, so that the gradient's part cancels.

Source: Zhu et al. 2023, arXiv 2306.02913, theorem 1 (decentralised SGD descends
E L(w + e), e ~ N(0, Xi)); Pearlmutter 1994 (Hessian-vector products).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

RELATIVE_LENGTH = 0.1
PAIRS = 8
"""Pairs of draws per mean."""
MOST_ITERATIONS = 100
TOLERANCE = 0.001
"""Relative change of the eigenvalue's estimate at which the iteration ends."""

Loss = Callable[[Tensor], Tensor]
"""Parameters (P,) -> mean training loss, with a graph."""


def examine(loss: Loss, params_RP: Tensor, seed: int) -> dict[str, float]:
    """Everything this module knows, of the replicas `params_RP`."""
    mean_P = params_RP.mean(0)
    apart_RP = params_RP - mean_P
    random = torch.Generator().manual_seed(seed)
    length = float(mean_P.norm())
    found = {
        "training_loss": float(loss(mean_P).detach()),
        "norm": length,
        "top_eigenvalue": top_eigenvalue(loss, mean_P, random),
        "rise_isotropic": rise(
            loss, mean_P, lambda: isotropic(mean_P, RELATIVE_LENGTH * length, random)
        ),
    }
    if len(params_RP) > 1:
        distance = float(apart_RP.norm()) / math.sqrt(len(params_RP))
        found["distance"] = distance
        found["rise_own"] = rise(loss, mean_P, lambda: gaussian(apart_RP, random))
        found["rise_own_isotropic"] = rise(
            loss, mean_P, lambda: isotropic(mean_P, distance, random)
        )
    return found


@torch.no_grad()
def rise(loss: Loss, params_P: Tensor, draw: Callable[[], Tensor]) -> float:
    """Mean of L(w + e) - L(w) over draws of e (P,)."""
    total = 0.0
    for _ in range(PAIRS):
        e_P = draw()
        total += float(loss(params_P + e_P)) + float(loss(params_P - e_P))
    return total / (2 * PAIRS) - float(loss(params_P))


def top_eigenvalue(loss: Loss, params_P: Tensor, random: torch.Generator) -> float:
    """The Hessian's eigenvalue of largest magnitude."""
    at_P = params_P.detach().requires_grad_()
    (gradient_P,) = torch.autograd.grad(loss(at_P), at_P, create_graph=True)
    v_P = isotropic(params_P, 1.0, random)
    value = 0.0
    for _ in range(MOST_ITERATIONS):
        v_P = v_P / v_P.norm()
        (hv_P,) = torch.autograd.grad(gradient_P @ v_P, at_P, retain_graph=True)
        before, value = value, float(v_P @ hv_P.detach())
        if abs(value - before) <= TOLERANCE * abs(value):
            break
        v_P = hv_P
    return value


def isotropic(like_P: Tensor, length: float, random: torch.Generator) -> Tensor:
    """Normal, equal in all directions, of that root mean square length."""
    return torch.randn(like_P.shape, generator=random) * (length / math.sqrt(len(like_P)))


def gaussian(apart_RP: Tensor, random: torch.Generator) -> Tensor:
    """Normal with the covariance of the rows, whose mean is 0."""
    return torch.randn(len(apart_RP), generator=random) @ apart_RP / math.sqrt(len(apart_RP))
