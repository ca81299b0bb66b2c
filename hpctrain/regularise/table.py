"""What the tables of all regularisers have in common."""

from __future__ import annotations

from typing import ClassVar

from hpctrain.table import Table


class RegulariserTable(Table):
    """Keys of every [[regulariser]] table; each of them has a `kind` beside."""

    adjusts_gradient: ClassVar[bool]
    """Whether it adds to the summed gradient, and so needs an exchange that leaves one."""
