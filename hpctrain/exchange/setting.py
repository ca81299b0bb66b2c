"""What an exchange is built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpctrain.compress.feedback import LocalRule
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

    @property
    def on_host(self) -> bool:
        """Whether the gradients lie in the memory of the host."""
        return self.flat.grads_P.device.type == "cpu"

    def local_rule(
        self,
        gives: Literal["update", "gradient"],
        parties: int,
        *,
        feedback: bool,
        masking: bool,
    ) -> LocalRule:
        """What of the optimiser's rule comes before selection: all of it for updates. Local."""
        if gives == "gradient":
            return LocalRule(feedback=feedback)
        sgd = self.optimiser
        assert isinstance(sgd, Sgd), "refused by require_fit"
        return LocalRule(
            momentum=sgd.momentum,
            nesterov=sgd.nesterov,
            weight_decay=sgd.weight_decay / parties,
            feedback=feedback,
            clips=sgd.clip_norm is not None,
            masking=masking and sgd.momentum > 0.0,
        )
