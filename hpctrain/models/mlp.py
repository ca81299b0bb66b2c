"""Multi-layer perceptron on the flattened inputs."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from hpctrain.data.spec import Spec
from hpctrain.models.fit import require_fit
from hpctrain.table import Table

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Mlp(Table):
    """[model] kind = "mlp": linear layers with an activation between them."""

    kind: Literal["mlp"] = "mlp"
    """The model."""
    widths: list[Annotated[int, Field(ge=1)]] = Field(default=[128], min_length=1)
    """Width of each hidden layer, first to last."""
    activation: Literal["relu", "tanh", "gelu"] = "relu"
    """What follows each hidden layer."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability with which a hidden value is zeroed in training."""

    def build(self, spec: Spec) -> nn.Module:
        """The module for `spec`: (B, *input_shape) -> (B, n_outputs). Local.

        Raises:
            ConfigError: the data are not float vectors or images.
        """
        require_fit(self.kind, spec)
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        width = torch.Size(spec.input_shape).numel()
        for depth, next_width in enumerate(self.widths, start=1):
            layers[f"hidden{depth}"] = nn.Linear(width, next_width)
            layers[f"{self.activation}{depth}"] = _ACTIVATIONS[self.activation]()
            if self.dropout > 0.0:
                layers[f"dropout{depth}"] = nn.Dropout(self.dropout)
            width = next_width
        layers["head"] = nn.Linear(width, spec.n_outputs)
        return nn.Sequential(layers)
