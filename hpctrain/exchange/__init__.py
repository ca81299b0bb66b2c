"""How gradients are combined at every step: table `[exchange]`, one file per `kind`."""

from __future__ import annotations

from typing import Literal, Protocol

from hpctrain.exchange.dense import Dense
from hpctrain.state import State

ExchangeConfig = Dense
"""The choices of `exchange.kind`. A new exchange is one more member of this union."""


class Exchange(Protocol):
    """Combines the flat gradient over ranks, while the last backward pass of a step runs."""

    gives: Literal["gradient", "update"]
    """What `finish` leaves in the flat gradient: the sum over ranks, or a finished update."""

    def arm(self) -> None:
        """Say that the next backward pass is the step's last. Local."""
        ...

    def disarm(self) -> None:
        """Take `arm` back: the next backward pass only adds to the gradient. Local."""
        ...

    def finish(self) -> None:
        """Collective. Complete the exchange; afterwards every rank's flat gradient is equal."""
        ...

    def close(self) -> None:
        """Collective. Remove hooks and end the transport's threads."""
        ...

    def state(self) -> State: ...

    def load_state(self, state: State) -> None: ...
