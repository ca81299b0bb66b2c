"""The gradient of every single sample, by torch.func: exact, and costly.

    g_i = gradient of the loss of sample i alone at the present parameters, i = 1..B

Backward of a whole batch only gives their sum. Here `vmap(grad(functional_call))` gives each one,
and holds them all at once: B x P numbers. `chunk` bounds that: the samples are taken so many at a
time, whatever their number.

A cost of 4 to 60 times the plain gradient, by model and batch; group means (stats/noise.py) tell
nearly as much for next to nothing. This is for whole-set measurements, for tables by layer and as
the exact value that estimators are compared with.

The module keeps its mode. Where it draws at random (dropout in training mode) every sample draws
for itself, and that noise counts as part of the sample's gradient. Batch normalisation is refused
in either mode: with it the loss of a sample depends on the others in its batch, so there is no
gradient of that sample alone. (DiveBatch's code switches it to its running statistics for this
backward, which then belongs to another loss than the one that is trained.)

Attention takes torch's plain kernel here, the only one that vmap can map: (T, T) numbers per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from hpctrain.errors import ConfigError

SampleLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, inputs (B, ...), targets (B, ...)) -> the loss of each sample, (B,)."""

CHUNK_FLOATS = 1 << 24
"""Numbers held at once unless told otherwise: 64 MiB in float32."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of some samples, by parameter."""

    parts: dict[str, Tensor]
    """{name: (B, *shape of the parameter)}."""

    def squares(self) -> Tensor:
        """|g_i|² by sample and parameter, (B, L) float64. Local, pure."""
        rows = [g.flatten(1).square().sum(1, dtype=torch.float64) for g in self.parts.values()]
        return torch.stack(rows, 1)

    def total(self) -> Tensor:
        """sum_i g_i over the samples, flat in the order of `parts`, (P,) float64. Local, pure."""
        return torch.cat([g.sum(0, dtype=torch.float64).flatten() for g in self.parts.values()])

    def products(self, other: Gradients) -> Tensor:
        """g_i . h_j for all pairs, (B, B') float64. Local, pure."""
        total = torch.zeros((), dtype=torch.float64)
        for name, g in self.parts.items():
            total = total + g.flatten(1).double() @ other.parts[name].flatten(1).double().T
        return total


class PerSample:
    """Takes per-sample gradients of one module under one loss. Every method is local.

    Args:
        module: Trainable parameters are those with `requires_grad`; a tied one counts once.
        loss: Each sample's loss, a function of that sample and the parameters only.

    Raises:
        ConfigError: the module has batch normalisation, or nothing to train.
    """

    def __init__(self, module: nn.Module, loss: SampleLoss) -> None:
        refuse_batch_norm(module)
        self._whole = _Loss(module, loss)
        self._names = [name for name, p in module.named_parameters() if p.requires_grad]
        if not self._names:
            raise ConfigError("the model has no trainable parameter; there is no gradient to take")
        self._each = vmap(grad(self._one), in_dims=(None, 0, 0), randomness="different")

    @property
    def names(self) -> list[str]:
        """The trainable parameters, in the order of every result."""
        return list(self._names)

    @property
    def sizes(self) -> list[int]:
        """Their numbers of entries; P together."""
        return [p.numel() for p in self._parameters().values()]

    def chunk(self, floats: int = CHUNK_FLOATS) -> int:
        """How many samples hold at most so many numbers; at least one."""
        return max(1, floats // sum(self.sizes))

    def gradients(self, inputs: Tensor, targets: Tensor) -> Gradients:
        """The gradients of all these samples at once. Leaves `.grad` and parameters alone.

        Args:
            inputs: (B, ...), B >= 1.
            targets: (B, ...).

        Raises:
            ConfigError: the model cannot be differentiated sample by sample.
        """
        parameters = {name: p.detach() for name, p in self._parameters().items()}
        try:
            with sdpa_kernel(SDPBackend.MATH):
                parts = self._each(parameters, inputs, targets)
        except RuntimeError as error:
            raise ConfigError(
                "the gradient of single samples cannot be taken of this model; its forward pass "
                "must be a function of tensors that torch.func.vmap can map (no .item(), no branch "
                f"on values, no buffer changed in place). torch says: {error}"
            ) from error
        return Gradients(parts)

    def chunks(
        self, inputs: Tensor, targets: Tensor, chunk: int | None = None
    ) -> Iterator[Gradients]:
        """The same, `chunk` samples at a time, in order; by default as many as `chunk()` says."""
        size = chunk or self.chunk()
        for one, other in zip(inputs.split(size), targets.split(size), strict=True):
            yield self.gradients(one, other)

    def squared_norms(self, inputs: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
        """|g_i|² by sample and parameter, (B, L) float64; `.sum(1)` is of the whole gradient."""
        return torch.cat([part.squares() for part in self.chunks(inputs, targets, chunk)])

    def _parameters(self) -> dict[str, nn.Parameter]:
        named = dict(self._whole.module.named_parameters())
        return {name: named[name] for name in self._names}

    def _one(self, parameters: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
        renamed = {f"module.{name}": p for name, p in parameters.items()}
        batch_of_one = (inputs[None], target[None])
        loss_1: Tensor = functional_call(self._whole, renamed, batch_of_one)
        return loss_1[0]


class _Loss(nn.Module):
    """Module and loss as one forward pass: what `functional_call` can call."""

    def __init__(self, module: nn.Module, loss: SampleLoss) -> None:
        # Not train or eval: a new parent must not touch the mode of what it holds.
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.module, inputs, targets)


def refuse_batch_norm(module: nn.Module) -> None:
    """Local.

    Raises:
        ConfigError: the module has batch normalisation; names the first.
    """
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            raise ConfigError(
                f'the layer "{name}" ({type(part).__name__}) is batch normalisation: a sample\'s '
                "loss then depends on the others in its batch, and the gradient of one sample is "
                "not defined. Take a model with group or layer normalisation (resnet20: model.norm "
                '= "group"); the estimate from groups of samples during training works with both'
            )
