"""What an exchange is built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import OptimiserConfig, Sgd
from hpctrain.transport.communicator import Communicator, DenseReducer


@dataclass(frozen=True)
class Setting:
    """Where an exchange works."""

    flat: FlatModel
    """The model; exchanges read and overwrite its flat gradient."""
    comm: Communicator
    """The ranks that take part; an exchange works on splits of it."""
    make_reducer: Callable[[Any, Sequence[str]], DenseReducer | None]
    """(the [exchange] table, one name per bucket) -> what sums buckets; collective."""
    optimiser: OptimiserConfig = Sgd()
    """The update rule that follows, or that an exchange which gives updates applies itself."""
