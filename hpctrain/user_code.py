"""Functions of the user's own, named "package.module:function" in the configuration."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from hpctrain.errors import ConfigError

CUSTOM = "package.module:function"
"""How a `kind` of the user's own is written; its tag in the unions of kinds."""

PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""Of a `kind` that names a function."""


def union_tag(value: Any) -> Any:
    """Which member of a union of kinds a table means: its `kind`, or `CUSTOM`. Local."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return CUSTOM if isinstance(kind, str) and ":" in kind else kind


def load_function(table: str, kind: str, *positional: Any, **keywords: Any) -> Callable[..., Any]:
    """The function that a `kind` names, after checking that it takes these arguments. Local.

    Modules are looked for where Python looks, and after that in the working directory.

    Args:
        table: "model" or "data", for messages.
        kind: "package.module:function".
        positional: What hpctrain passes.
        keywords: The table's `args`.

    Raises:
        ConfigError: module or function is missing, or the arguments do not fit.
    """
    where = f'{table}.kind = "{kind}"'
    module_name, _, function_name = kind.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{where}: {error}. Python must find the module on every rank: start in its folder, "
            "install it, or set PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ConfigError(
            f'{where}: {error}. Write "package.module:function" with a function that the module '
            "defines"
        ) from error
    if not callable(function):
        raise ConfigError(f"{where} is {function!r}, not a function")
    try:
        inspect.signature(function).bind(*positional, **keywords)
    except TypeError as error:
        raise ConfigError(
            f"{where} does not take these arguments: {error}. [{table}.args] must match the "
            "function's keyword arguments"
        ) from error
    return function  # type: ignore[no-any-return] # whatever the user's function is
