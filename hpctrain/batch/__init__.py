"""How many samples the next step takes: one file per `kind`, and the learning rate for them.

A policy's config is a frozen table; `build()` gives the running policy, which has a state.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from hpctrain.batch.adabatch import AdaBatch
from hpctrain.batch.cosine import Cosine
from hpctrain.batch.divebatch import DiveBatch
from hpctrain.batch.fixed import Fixed
from hpctrain.batch.goodput import Goodput
from hpctrain.batch.normtest import NormTest
from hpctrain.batch.policy import BatchPolicy, Decision, Seen, StepTimes
from hpctrain.batch.replay import Replay


def _kind(value: Any) -> Any:
    """The union's tag; fixed where the table names no kind."""
    return value.get("kind", "fixed") if isinstance(value, dict) else getattr(value, "kind", None)


BatchConfig = Annotated[
    Annotated[Fixed, Tag("fixed")]
    | Annotated[AdaBatch, Tag("adabatch")]
    | Annotated[DiveBatch, Tag("divebatch")]
    | Annotated[NormTest, Tag("normtest")]
    | Annotated[Cosine, Tag("cosine")]
    | Annotated[Goodput, Tag("goodput")]
    | Annotated[Replay, Tag("replay")],
    Discriminator(_kind),
]
"""The choices of `batch.kind`. A new policy is one more member of this union."""

__all__ = ["BatchConfig", "BatchPolicy", "Decision", "Fixed", "Seen", "StepTimes"]
