"""Automatic exchange: top-k where that is faster than the dense sum, measured as the run goes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpctrain.exchange.switch import Switch
from hpctrain.exchange.topk import TopkSettings
from hpctrain.transport.communicator import Communicator


class Auto(TopkSettings):
    """[exchange] kind = "auto": top-k or dense for each bucket, whichever is faster."""

    kind: Literal["auto"] = "auto"
    """Choose between sparse and dense by measured time (see `switch`)."""
    hysteresis: float = Field(default=1.1, ge=1.0)
    """A form in use is given up only for one so many times faster."""
    retry_share: float = Field(default=0.01, gt=0.0, lt=1.0)
    """Most of the steps' time that trying the slower form again may take."""

    def make_switch(self, n_buckets: int, comm: Communicator) -> Switch:
        """What chooses. Local."""
        return Switch(self.hysteresis, self.retry_share, n_buckets, comm)
