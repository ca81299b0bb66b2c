"""What the tables of all exchanges have in common."""

from __future__ import annotations

from typing import ClassVar, Literal

from hpctrain.table import Table


class ExchangeTable(Table):
    """Keys of every [exchange] table that exchanges something."""

    exact: ClassVar[bool] = False
    """Whether every rank holds the mean gradient of a step after its exchange."""

    scope: Literal["world", "switch", "group", "node", "numa"] = "world"
    """Over which ranks gradients are summed: all, those at one switch, those of a group of
    [topology], those of a node, or of a NUMA domain. Narrower than world, [[sync]] rules
    reconcile the rest."""
