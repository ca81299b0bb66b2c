"""A user's own model: `kind = "package.module:function"`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError
from hpctrain.table import Table
from hpctrain.user_code import PATTERN, load_function


class CustomModel(Table):
    """[model] kind = "package.module:function": the function makes the module.

    It is called as `function(spec, **args)` and returns an `nn.Module` that maps a batch of inputs
    to outputs of shape (B, n_outputs), for language (B, context, n_outputs). A module with a
    method `per_sample_loss(inputs, targets)` decides its own loss (see `models/loss.py`).
    """

    kind: Annotated[str, Field(pattern=PATTERN)]
    """Where the function is: a module that Python can import, a colon, the function's name."""
    args: dict[str, Any] = {}
    """Keyword arguments for the function."""

    def build(self, spec: Spec) -> nn.Module:
        """What the user's function returns for `spec`. Local.

        Raises:
            ConfigError: the module or function is missing, the arguments do not fit, or what it
                returned is not a module.
        """
        module = load_function("model", self.kind, spec, **self.args)(spec, **self.args)
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f'model.kind = "{self.kind}" returned {type(module).__name__}; '
                "it must return a torch.nn.Module."
            )
        return module
