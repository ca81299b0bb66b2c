"""A run of hpctrain in which all replicas are rows of one tensor: the arithmetic without the ranks.

Initial parameters, sample order, step sizes, mixing matrices and noise are hpctrain's own; only the
loop is not. Several times cheaper than ranks on threads, where small replicas spend their time in
calls. For an MLP, SGD, [exchange] kind "dense" or "none", and [[sync]] "gossip" with
order = "before"; `benchmarks.decentralised check` compares it with hpctrain itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpctrain.config import Run
from hpctrain.data.order import SampleOrder
from hpctrain.data.spec import DataSets
from hpctrain.models.flat import FlatModel
from hpctrain.randomness import RandomState
from hpctrain.regularise.sam import Sam
from hpctrain.sync.mixing import mixing_matrix
from hpctrain.transport.threads import run_threads


@dataclass(frozen=True)
class Task:
    """Both splits in memory; images as rows."""

    data: DataSets
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, run: Run) -> Task:
        (data,) = run_threads(1, lambda comm: run.data.load(comm.node(), run.seed))
        parts = [split.batch(np.arange(len(split)), epoch=0) for split in (data.train, data.test)]
        train, test = [(inputs.flatten(1), targets) for inputs, targets in parts]
        return cls(data, train, test)


class Replicas:
    """R copies of a run's model, equal at first.

    Attributes:
        flat: The model, for slices and shapes; it holds the parameters where R = 1.
        params_RP: All parameters.
    """

    def __init__(self, run: Run, task: Task, count: int) -> None:
        RandomState(run.seed, 0).seed_model()
        self.flat = FlatModel(run.model.build(task.data.spec))
        rows = self.flat.params_P[None]
        self.params_RP = rows if count == 1 else rows.repeat(count, 1)

    def outputs(self, params_RP: Tensor, inputs_RBD: Tensor) -> Tensor:
        """(R, B, n_outputs): each row of parameters on its own inputs."""
        values = inputs_RBD
        layers = list(zip(self.flat.slices, self.flat.shapes, strict=True))
        pairs = list(itertools.pairwise(layers))[::2]
        for depth, ((weight, shape), (bias, _)) in enumerate(pairs):
            if depth:
                values = values.relu()
            weight_RIO = params_RP[:, weight].unflatten(1, shape).transpose(1, 2)
            values = torch.baddbmm(params_RP[:, None, bias], values, weight_RIO)
        return values

    def loss(self, params_RP: Tensor, inputs_RBD: Tensor, targets_RB: Tensor) -> Tensor:
        """Sum over replicas of the mean loss of each."""
        outputs = self.outputs(params_RP, inputs_RBD).flatten(0, 1)
        total = F.cross_entropy(outputs, targets_RB.flatten(), reduction="sum")
        return total / targets_RB.shape[1]

    @torch.no_grad()
    def evaluate(self, params_RP: Tensor, split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(R,) losses and accuracies, one row after the other."""
        inputs, targets = split
        found = []
        for params_P in params_RP:
            outputs = self.outputs(params_P[None], inputs[None])[0]
            correct = (outputs.argmax(1) == targets).float().mean()
            found.append(torch.stack([F.cross_entropy(outputs, targets), correct]))
        losses, accuracies = torch.stack(found).unbind(1)
        return losses, accuracies


@dataclass(frozen=True)
class Moment:
    """Where a training is after some steps."""

    steps: int
    replicas: Replicas
    distance: float
    """sqrt(mean of |x_i - mean|^2)"""
    training_loss: float
    """Of the step's batch, before its update, each replica at its own parameters."""


def train(
    run: Run, task: Task, ranks: int, lengths: dict[int, float] | None = None
) -> Iterator[Moment]:
    """Every step of a run.

    Args:
        run: The configuration.
        task: Its data.
        ranks: Replicas where the run has a gossip rule; each step's batch is cut evenly.
        lengths: For exact averaging: first step -> length of the average-direction noise from then.
    """
    rule: Any = run.sync[0] if run.sync else None
    count = ranks if rule else 1
    replicas = Replicas(run, task, count)
    optimiser: Any = run.optimiser
    params_RP = replicas.params_RP
    velocity_RP = torch.zeros_like(params_RP)
    batch, steps = run.batch.batch_global, run.train.steps
    assert steps is not None
    inputs, targets = task.train
    order = SampleOrder(len(targets), run.seed, 0, 1)
    noise = None
    for step in range(steps):
        indices = torch.from_numpy(order.next(batch).indices.astype(np.int64)).view(count, -1)
        lr = run.lr.lr_at(step * batch, steps * batch, len(targets), batch)
        if lengths and step in lengths:
            noise = Sam(form="average", rho=lengths[step]).build(replicas.flat, run.seed)
        if noise is not None:
            noise.perturb(step, lambda: None)
        at_RP = params_RP.detach().requires_grad_()
        loss = replicas.loss(at_RP, inputs[indices], targets[indices])
        (grads_RP,) = torch.autograd.grad(loss, at_RP)
        with torch.no_grad():
            if noise is not None:
                noise.restore()
            if rule:
                weights = mixing_matrix(rule.graph, count, step)
                params_RP.copy_(torch.from_numpy(weights).float() @ params_RP)
            grads_RP = grads_RP.add(params_RP, alpha=optimiser.weight_decay)
            velocity_RP.mul_(optimiser.momentum).add_(grads_RP)
            params_RP.sub_(velocity_RP, alpha=lr)
        apart = float((params_RP - params_RP.mean(0)).norm()) if rule else 0.0
        yield Moment(step + 1, replicas, apart / math.sqrt(count), float(loss.detach()) / count)
