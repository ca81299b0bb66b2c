"""Models by name: one file per `kind`, each a config table whose `build(spec)` gives a module.

A model is built for the data it will see (`Spec`), and refuses data it does not fit. Its initial
values depend on torch's global seed only: the caller seeds torch, then calls `build`. They are
drawn in float32; a float64 run converts them afterwards, so both start from the same point.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from hpctrain.models.cnn import Cnn
from hpctrain.models.custom import CustomModel
from hpctrain.models.gpt import Gpt
from hpctrain.models.logistic import Logistic
from hpctrain.models.mlp import Mlp
from hpctrain.models.resnet20 import Resnet20


def _member(value: Any) -> Any:
    """The union's tag: `kind` itself, or "package.module:function" for a user's own."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "package.module:function" if isinstance(kind, str) and ":" in kind else kind


ModelConfig = Annotated[
    Annotated[Logistic, Tag("logistic")]
    | Annotated[Mlp, Tag("mlp")]
    | Annotated[Cnn, Tag("cnn")]
    | Annotated[Resnet20, Tag("resnet20")]
    | Annotated[Gpt, Tag("gpt")]
    | Annotated[CustomModel, Tag("package.module:function")],
    Discriminator(_member),
]
"""The table [model]."""

__all__ = ["Cnn", "CustomModel", "Gpt", "Logistic", "Mlp", "ModelConfig", "Resnet20"]
