"""How many samples the next step takes: one file per `kind`, and the learning rate for them.

A policy's config is a frozen table; `build()` gives the running policy, which has a state.
"""

from __future__ import annotations

from typing import Protocol

from hpctrain.batch.fixed import Fixed
from hpctrain.state import Stateful

BatchConfig = Fixed
"""The table [batch]."""


class BatchPolicy(Stateful, Protocol):
    """Decides the size of each step's batch from numbers that are equal on all ranks."""

    def decide(self, samples_seen: int) -> int:
        """batch_global of the next step, after `samples_seen` samples of training. Local."""
        ...


__all__ = ["BatchConfig", "BatchPolicy", "Fixed"]
