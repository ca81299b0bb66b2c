"""Problems whose gradient noise is known exactly, from every sample's gradient norm.

A linear layer's gradient for one sample is the outer product of its input and of the loss's
derivative by its output, so its squared norm is the product of theirs (Goodfellow 2015, arXiv
1510.01799); a convolution's is the product of two small matrices per sample, made by `unfold`. One
forward and one backward pass then give the gradients of all groups and the norms of all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpctrain.data.idx import Idx
from hpctrain.data.libsvm import Libsvm
from hpctrain.data.spec import Spec
from hpctrain.models.cnn import Cnn
from hpctrain.models.mlp import Mlp
from hpctrain.transport.threads import run_threads


class Problem(Protocol):
    """A training set of n samples and a model of P parameters."""

    n: int

    def start(self, seed: int) -> Tensor:
        """(P,) initial parameters."""
        ...

    def pass_over(self, params_P: Tensor, index_KB: Tensor) -> tuple[Tensor, Tensor]:
        """(K, P) mean gradients of K groups of samples, and (K, B) squared norms of each one's."""
        ...


@dataclass
class Logistic:
    """Logistic regression on dense rows; labels 0 and 1. Starts at zero."""

    rows_ND: Tensor
    labels_N: Tensor

    def __post_init__(self) -> None:
        self.n = len(self.rows_ND)
        self.squares_N = (self.rows_ND * self.rows_ND).sum(1)

    def start(self, seed: int) -> Tensor:
        return torch.zeros(self.rows_ND.shape[1])

    def pass_over(self, params_P: Tensor, index_KB: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows_ND[index_KB]
        off = torch.sigmoid(rows @ params_P) - self.labels_N[index_KB]
        gradients = torch.einsum("kb,kbd->kd", off, rows) / index_KB.shape[1]
        return gradients, off * off * self.squares_N[index_KB]


class Network:
    """Softmax classification by a module of linear layers and 3x3 convolutions with padding 1."""

    def __init__(self, model: Any, spec: Spec, inputs: Tensor, labels_N: Tensor) -> None:
        self.model, self.spec, self.inputs, self.labels_N = model, spec, inputs, labels_N
        self.n = len(labels_N)
        self.module = model.build(spec)
        self.layers = [m for m in self.module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.seen: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers:
            layer.register_forward_hook(lambda _, x, out: self.seen.append((x[0], out)))
        for module in self.module.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False

    def start(self, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(self.model.build(self.spec).parameters()).detach()

    def pass_over(self, params_P: Tensor, index_KB: Tensor) -> tuple[Tensor, Tensor]:
        groups, batch = index_KB.shape
        index = index_KB.flatten()
        nn.utils.vector_to_parameters(params_P, self.module.parameters())
        self.seen = []
        logits = self.module(self.inputs[index])
        loss = F.cross_entropy(logits, self.labels_N[index], reduction="sum")
        outputs = [out for _, out in self.seen]
        slopes = torch.autograd.grad(loss, outputs)
        found, norms = [], torch.zeros(len(index))
        for (x, _), slope in zip(self.seen, slopes, strict=True):
            x = x.detach()
            if slope.dim() == 2:
                norms += (slope * slope).sum(1) * (1.0 + (x * x).sum(1))
                by_group = slope.view(groups, batch, -1)
                weight = by_group.transpose(1, 2) @ x.view(groups, batch, -1)
                bias = by_group.sum(1)
            else:
                each = slope.flatten(2) @ F.unfold(x, 3, padding=1).transpose(1, 2)
                bias_each = slope.flatten(2).sum(2)
                norms += (each * each).sum((1, 2)) + (bias_each * bias_each).sum(1)
                weight = each.view(groups, batch, -1).sum(1)
                bias = bias_each.view(groups, batch, -1).sum(1)
            found += [weight.flatten(1), bias]
        return torch.cat(found, 1) / batch, norms.view(groups, batch)


def truth(problem: Problem, params_P: Tensor, chunk: int = 500) -> tuple[float, float]:
    """(s2, mu2) over the whole set, by one pass over it."""
    total_P, squares = torch.zeros(len(params_P), dtype=torch.float64), 0.0
    for index in torch.arange(problem.n).split(chunk):
        gradients, norms = problem.pass_over(params_P, index[None])
        total_P += len(index) * gradients[0]
        squares += float(norms.double().sum())
    mu2 = float((total_P / problem.n) @ (total_P / problem.n))
    return squares / problem.n - mu2, mu2


def a9a(root: Path) -> Logistic:
    source = Libsvm(root=str(root), train="libsvm/a9a.bz2", test="libsvm/a9a.t.bz2")
    rows, labels, _ = read(source)
    return Logistic(torch.cat([rows, torch.ones(len(rows), 1)], 1), labels.float())


def noisy_logistic(root: Path) -> Logistic:
    """20 000 rows of 512 features in U(-1, 1), signs of a random direction, 10 % turned."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1.0, 1.0, (20_000, 512))
    labels = (rows @ rng.standard_normal(512) > 0) ^ (rng.random(20_000) < 0.1)
    return Logistic(torch.tensor(rows, dtype=torch.float32), torch.tensor(labels).float())


def mnist_mlp(root: Path) -> Network:
    inputs, labels, spec = read(Idx(root=str(root), folder="mnist", limit_train=5_000))
    return Network(Mlp(widths=[64]), spec, inputs, labels)


def fashion_cnn(root: Path) -> Network:
    inputs, labels, spec = read(Idx(root=str(root), folder="fashion-mnist", limit_train=5_000))
    return Network(Cnn(channels=[8, 16], hidden=32), spec, inputs, labels)


def read(source: Any) -> tuple[Tensor, Tensor, Spec]:
    (data,) = run_threads(1, lambda comm: source.load(comm.node(), 0))
    inputs, labels = data.train.batch(np.arange(len(data.train)), epoch=0)
    return inputs, labels, data.spec
