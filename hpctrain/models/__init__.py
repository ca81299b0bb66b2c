"""Models by name: one file per `kind`, each a config table whose `build(spec)` gives a module.

A model is built for the data it will see (`Spec`), and refuses data it does not fit. Its initial
values depend on torch's global seed only: the caller seeds torch, then calls `build`. They are
drawn in float32; a float64 run converts them afterwards, so both start from the same point.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from hpctrain.models.cnn import Cnn
from hpctrain.models.custom import CustomModel
from hpctrain.models.gpt import Gpt
from hpctrain.models.logistic import Logistic
from hpctrain.models.mlp import Mlp
from hpctrain.models.resnet20 import Resnet20
from hpctrain.user_code import CUSTOM, union_tag

ModelConfig = Annotated[
    Annotated[Logistic, Tag("logistic")]
    | Annotated[Mlp, Tag("mlp")]
    | Annotated[Cnn, Tag("cnn")]
    | Annotated[Resnet20, Tag("resnet20")]
    | Annotated[Gpt, Tag("gpt")]
    | Annotated[CustomModel, Tag(CUSTOM)],
    Discriminator(union_tag),
]
"""The table [model]."""

__all__ = ["Cnn", "CustomModel", "Gpt", "Logistic", "Mlp", "ModelConfig", "Resnet20"]
