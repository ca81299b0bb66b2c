"""The loss of each sample, for every task.

    classification   cross-entropy of the softmax; with one output for two classes, of the sigmoid
    language         the mean over the window's tokens of the softmax cross-entropy (nats per token)
    regression       ½·‖outputs - targets‖²

A mean over samples is never taken here: the caller sums, and divides by the global count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError


def per_sample_loss(
    module: nn.Module, spec: Spec, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward pass, then each sample's loss and correctness. Local.

    Args:
        module: the model. If it has a method `per_sample_loss(inputs, targets)`, that is called
            instead; it returns loss_B, or the pair (loss_B, correct_B).
        spec: the data's description.
        inputs: (B, *input_shape); float inputs are converted to the dtype of the parameters.
        targets: classification int64 (B,); language int64 (B, T); regression float (B, n_outputs)
            or, for one output, (B,).

    Returns:
        loss_B in the dtype of the parameters (also under autocast), differentiable, and correct_B
        in the same dtype: 1 or 0 per sample, for language the fraction of tokens predicted, NaN
        for regression and for a model that does not say.

    Raises:
        ConfigError: the model's outputs have the wrong shape.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    own_loss = getattr(module, "per_sample_loss", None)
    if own_loss is not None:
        return _checked(own_loss(inputs, targets), len(inputs), dtype)
    outputs = module(inputs).to(dtype)
    if spec.task == "language":
        _require_shape(outputs, (*targets.shape, spec.n_outputs))
        loss_N = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        hits_BT = outputs.detach().argmax(-1) == targets
        return loss_N.view(targets.shape).mean(1), hits_BT.to(dtype).mean(1)
    if spec.task == "regression":
        _require_shape(outputs, (len(inputs), spec.n_outputs))
        error_BK = outputs - targets.to(dtype).view(outputs.shape)
        return error_BK.square().sum(1) / 2, torch.full_like(error_BK[:, 0].detach(), torch.nan)
    if spec.n_outputs == 2 and outputs.shape == (len(inputs), 1):
        logit_B = outputs[:, 0]
        loss_B = F.binary_cross_entropy_with_logits(logit_B, targets.to(dtype), reduction="none")
        return loss_B, ((logit_B.detach() > 0) == (targets > 0)).to(dtype)
    _require_shape(outputs, (len(inputs), spec.n_outputs))
    loss_B = F.cross_entropy(outputs, targets, reduction="none")
    return loss_B, (outputs.detach().argmax(1) == targets).to(dtype)


def _require_shape(outputs: Tensor, expected: tuple[int, ...]) -> None:
    if outputs.shape != expected:
        raise ConfigError(
            f"the model returned outputs of shape {tuple(outputs.shape)}; this task needs "
            f"{expected}. Correct the model, or give it a method per_sample_loss(inputs, targets)."
        )


def _checked(
    returned: Tensor | tuple[Tensor, Tensor], n_samples: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A custom model's per-sample loss, and correctness (NaN when it gives none)."""
    loss_B, correct_B = returned if isinstance(returned, tuple) else (returned, None)
    if correct_B is None:
        correct_B = torch.full((n_samples,), torch.nan, dtype=dtype, device=loss_B.device)
    for name, tensor in (("loss", loss_B), ("correctness", correct_B)):
        if tensor.shape != (n_samples,):
            raise ConfigError(
                f"the model's per_sample_loss returned a {name} of shape {tuple(tensor.shape)} for "
                f"{n_samples} samples; it must return one value per sample, shape ({n_samples},)."
            )
    return loss_B.to(dtype), correct_B.detach().to(dtype)
