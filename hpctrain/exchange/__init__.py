"""How gradients are combined at every step: table `[exchange]`, one file per `kind`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

from pydantic import Discriminator, Tag

from hpctrain.exchange.auto import Auto
from hpctrain.exchange.delayed import Delayed
from hpctrain.exchange.dense import Dense
from hpctrain.exchange.none import NoExchange
from hpctrain.exchange.powersgd import PowerSgd
from hpctrain.exchange.quantise import Quantise
from hpctrain.exchange.topk import Topk
from hpctrain.state import State


def _kind(value: Any) -> Any:
    """The union's tag; dense where the table names no kind."""
    return value.get("kind", "dense") if isinstance(value, dict) else getattr(value, "kind", None)


ExchangeConfig = Annotated[
    Annotated[Dense, Tag("dense")]
    | Annotated[Topk, Tag("topk")]
    | Annotated[Auto, Tag("auto")]
    | Annotated[PowerSgd, Tag("powersgd")]
    | Annotated[Quantise, Tag("quantise")]
    | Annotated[Delayed, Tag("delayed")]
    | Annotated[NoExchange, Tag("none")],
    Discriminator(_kind),
]
"""The choices of `exchange.kind`. A new exchange is one more member of this union."""


class Exchange(Protocol):
    """Combines the flat gradient over ranks, while the last backward pass of a step runs.

    A step is `arm`, backward, `finish`, `settle`, and then the optimiser's step.
    """

    gives: Literal["gradient", "update"]
    """What `settle` leaves: in the flat gradient the sum over ranks, for any optimiser; or the
    update itself, already applied to the flat parameters."""
    algorithm: str
    """What moves the entries, for people."""
    bucket_names: list[str]
    """One per bucket, for messages about a stall."""

    @property
    def ready(self) -> bool:
        """Whether there is something to apply after this step's `settle`. Local."""
        ...

    @property
    def current(self) -> int:
        """The bucket that is being waited for, -1 when none; the watchdog's thread reads it."""
        ...

    def arm(self, lr: float = 1.0) -> None:
        """Say that the next backward pass is the step's last. Local.

        Args:
            lr: Step size, for an exchange that gives updates; others do not use it.
        """
        ...

    def disarm(self) -> None:
        """Take `arm` back: the next backward pass only adds to the gradient. Local."""
        ...

    def finish(self) -> bool:
        """Collective. Complete the exchange.

        Returns:
            Whether every rank's gradient was finite, as far as the exchange looks; equal on all
            ranks.
        """
        ...

    def settle(self, *, keep: bool) -> None:
        """Collective. Keep what `finish` brought, or restore what the step before had left.

        Afterwards every rank's flat gradient (or flat parameters) is equal.
        """
        ...

    def tally(self) -> dict[str, float]:
        """Numbers of the last step, for metrics.jsonl, equal on all ranks. Local."""
        ...

    def close(self) -> None:
        """Collective. Remove hooks and end the transport's threads."""
        ...

    def state(self) -> State: ...

    def load_state(self, state: State) -> None: ...
