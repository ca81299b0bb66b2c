"""Data sources by name: one file per `kind`, each a config table with a `load(node, seed)`.

One copy of a set per node. Which samples a step takes is decided by `order.SampleOrder`, and
`loader.Loader` makes batches of them ahead of time.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from hpctrain.data.cifar_binary import CifarBinary
from hpctrain.data.custom import CustomData
from hpctrain.data.digits import Digits
from hpctrain.data.idx import Idx
from hpctrain.data.libsvm import Libsvm
from hpctrain.data.synthetic import Synthetic
from hpctrain.data.text import Text
from hpctrain.user_code import CUSTOM, union_tag

DataConfig = Annotated[
    Annotated[Digits, Tag("digits")]
    | Annotated[Idx, Tag("idx")]
    | Annotated[CifarBinary, Tag("cifar-binary")]
    | Annotated[Text, Tag("text")]
    | Annotated[Libsvm, Tag("libsvm")]
    | Annotated[Synthetic, Tag("synthetic")]
    | Annotated[CustomData, Tag(CUSTOM)],
    Discriminator(union_tag),
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
