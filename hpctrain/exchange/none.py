"""No exchange: every rank trains on its own; `[[sync]]` rules reconcile the parameters."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from hpctrain.exchange.setting import Setting
from hpctrain.optimiser import OptimiserConfig
from hpctrain.settings import Train
from hpctrain.state import State
from hpctrain.table import Table


class NoExchange(Table):
    """[exchange] kind = "none": gradients stay on their rank."""

    kind: Literal["none"] = "none"
    """Every rank is a replica of its own."""

    gives: ClassVar[Literal["gradient"]] = "gradient"
    exact: ClassVar[bool] = False
    scope: ClassVar[Literal["rank"]] = "rank"

    def comes_last(self, shape: torch.Size) -> bool:
        """No parameter is treated apart. Local."""
        return False

    def require_fit(self, train: Train, optimiser: OptimiserConfig) -> None:
        """Fits everything. Local."""

    def build(self, setting: Setting) -> Alone:
        """Local. The running exchange."""
        return Alone()


class Alone:
    """Leaves every gradient as it is. All methods are local."""

    gives: Literal["gradient", "update"] = "gradient"
    ready = True
    algorithm = "none"

    def __init__(self) -> None:
        self.bucket_names: list[str] = []
        self.current = -1

    def arm(self, lr: float = 1.0) -> None:
        """Nothing to start."""

    def disarm(self) -> None:
        """Nothing to take back."""

    def finish(self) -> bool:
        """Nothing to wait for."""
        return True

    def settle(self, *, keep: bool) -> None:
        """Nothing to keep or to take back."""

    def tally(self) -> dict[str, float]:
        """No numbers."""
        return {}

    def close(self) -> None:
        """Nothing to end."""

    def state(self) -> State:
        """Nothing is remembered."""
        return State()

    def load_state(self, state: State) -> None:
        """Nothing to take back."""
