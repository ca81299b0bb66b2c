"""A user's own model: `kind = "package.module:function"`."""

from __future__ import annotations

import importlib
import inspect
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError
from hpctrain.table import Table


class CustomModel(Table):
    """[model] kind = "package.module:function": the function makes the module.

    It is called as `function(spec, **args)` and returns an `nn.Module` that maps a batch of inputs
    to outputs of shape (B, n_outputs), for language (B, context, n_outputs). A module with a
    method `per_sample_loss(inputs, targets)` decides its own loss (see `models/loss.py`).
    """

    kind: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """Where the function is: a module that Python can import, a colon, the function's name."""
    args: dict[str, Any] = {}
    """Keyword arguments for the function."""

    def build(self, spec: Spec) -> nn.Module:
        """What the user's function returns for `spec`. Local.

        Raises:
            ConfigError: the module or function is missing, the arguments do not fit, or what it
                returned is not a module.
        """
        module_name, _, function_name = self.kind.partition(":")
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f'model.kind = "{self.kind}": {error}. '
                "Python must find the module on every rank: install it or set PYTHONPATH."
            ) from error
        except AttributeError as error:
            raise ConfigError(
                f'model.kind = "{self.kind}": {error}. Write "package.module:function" with a '
                "function that the module defines."
            ) from error
        if not callable(function):
            raise ConfigError(f'model.kind = "{self.kind}" is {function!r}, not a function.')
        try:
            inspect.signature(function).bind(spec, **self.args)
        except TypeError as error:
            raise ConfigError(
                f'model.kind = "{self.kind}" is called with (spec, **{self.args}): {error}. '
                "[model.args] must match the function's keyword arguments."
            ) from error
        module = function(spec, **self.args)
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f'model.kind = "{self.kind}" returned {type(module).__name__}; '
                "it must return a torch.nn.Module."
            )
        return module
