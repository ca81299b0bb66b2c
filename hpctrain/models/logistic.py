"""Linear models: logistic regression, softmax regression, least squares.

    outputs_B = inputs_B · weight + bias

Two classes have one output, the log-odds of class 1, and the binary cross-entropy, which is convex
in the parameters; with `weight_decay` of the SGD optimiser as l2 term it is strongly convex. More
classes have one output each and the softmax cross-entropy. Regression minimises
½‖outputs - targets‖² (`models/loss.py`). All parameters start at zero, whatever the seed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import nn

from hpctrain.data.spec import Spec
from hpctrain.models.fit import require_fit
from hpctrain.table import Table


class Logistic(Table):
    """[model] kind = "logistic": one linear layer on the flattened inputs."""

    kind: Literal["logistic"] = "logistic"
    """The model."""
    bias: bool = True
    """Whether there is a constant term."""

    def build(self, spec: Spec) -> nn.Module:
        """The module for `spec`. Local.

        Raises:
            ConfigError: the data are not float vectors or images.
        """
        require_fit(self.kind, spec)
        binary = spec.task == "classification" and spec.n_outputs == 2
        n_inputs = torch.Size(spec.input_shape).numel()
        linear = nn.Linear(n_inputs, 1 if binary else spec.n_outputs, bias=self.bias)
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
        return nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=linear))
