"""The same number of samples at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from hpctrain.state import State
from hpctrain.table import Table


class Fixed(Table):
    """[batch] kind = "fixed": every step takes `batch_global` samples over all ranks."""

    kind: Literal["fixed"] = "fixed"
    """The policy."""
    batch_global: int = Field(default=128, ge=1)
    """Samples per step, over all ranks; the last step of an epoch takes what is left."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Most samples per forward pass on a rank; larger shares are taken in several passes, with the
    same sum of gradients. Bounds memory. Without it a rank's whole share goes in one pass."""

    @model_validator(mode="after")
    def _micro_within_global(self) -> Fixed:
        if self.micro_batch is not None and self.micro_batch > self.batch_global:
            raise ValueError(
                f"micro_batch = {self.micro_batch} is more than batch_global = "
                f"{self.batch_global}; a rank never has so many samples at once"
            )
        return self

    def build(self) -> FixedPolicy:
        """The running policy. Local."""
        return FixedPolicy(self.batch_global)


@dataclass(frozen=True)
class FixedPolicy:
    """Always the same decision; remembers nothing."""

    batch_global: int

    def decide(self, samples_seen: int) -> int:
        """`batch_global`, whenever asked. Local."""
        return self.batch_global

    def state(self) -> State:
        """Empty. Local."""
        return State()

    def load_state(self, state: State) -> None:
        """Nothing to take back. Local."""
