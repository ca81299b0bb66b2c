"""Data sources by name: one file per `kind`, each a config table with a `load(node, seed)`.

One copy of a set per node. Which samples a step takes is decided by `order.SampleOrder`, and
`loader.Loader` makes batches of them ahead of time.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from hpctrain.data.cifar_binary import CifarBinary
from hpctrain.data.custom import CustomData
from hpctrain.data.digits import Digits
from hpctrain.data.idx import Idx
from hpctrain.data.libsvm import Libsvm
from hpctrain.data.synthetic import Synthetic
from hpctrain.data.text import Text


def _member(value: Any) -> Any:
    """The union's tag: `kind` itself, or "package.module:function" for a user's own."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "package.module:function" if isinstance(kind, str) and ":" in kind else kind


DataConfig = Annotated[
    Annotated[Digits, Tag("digits")]
    | Annotated[Idx, Tag("idx")]
    | Annotated[CifarBinary, Tag("cifar-binary")]
    | Annotated[Text, Tag("text")]
    | Annotated[Libsvm, Tag("libsvm")]
    | Annotated[Synthetic, Tag("synthetic")]
    | Annotated[CustomData, Tag("package.module:function")],
    Discriminator(_member),
]
"""The table [data]."""

__all__ = [
    "CifarBinary",
    "CustomData",
    "DataConfig",
    "Digits",
    "Idx",
    "Libsvm",
    "Synthetic",
    "Text",
]
