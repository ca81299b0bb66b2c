"""How parameters are reconciled now and then: the tables `[[sync]]`, one file per `kind`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from hpctrain.sync.average import Average
from hpctrain.sync.downpour import Downpour
from hpctrain.sync.elastic import Elastic
from hpctrain.sync.fedaware import FedAware
from hpctrain.sync.gossip import Gossip
from hpctrain.sync.leader import Leader
from hpctrain.sync.qsparse import Qsparse


def _kind(value: Any) -> Any:
    """The union's tag; a table that names no kind is refused."""
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


SyncConfig = Annotated[
    Annotated[Average, Tag("average")]
    | Annotated[Leader, Tag("leader")]
    | Annotated[Elastic, Tag("elastic")]
    | Annotated[Downpour, Tag("downpour")]
    | Annotated[Gossip, Tag("gossip")]
    | Annotated[FedAware, Tag("fedaware")]
    | Annotated[Qsparse, Tag("qsparse")],
    Discriminator(_kind),
]
"""The choices of `sync.kind`. A new rule is one more member of this union."""
