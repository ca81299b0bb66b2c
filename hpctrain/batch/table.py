"""What the tables of all batch policies have in common."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hpctrain.batch.lr import LrConfig
from hpctrain.errors import ConfigError
from hpctrain.settings import Train
from hpctrain.table import Table

Need = Literal["noise", "times", "epoch", "oracle"]
"""What a policy decides by: `Seen.noise` (and `Seen.latest`), `Seen.times`, or
`Seen.epoch_diversity` by DiveBatch's estimator or exactly."""


class BatchTable(Table):
    """Keys of every table [batch]."""

    batch_global: int = Field(default=128, ge=1)
    """Samples per step, over all ranks, at the start; the last step of an epoch takes what is
    left."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Most samples per forward pass on a rank; larger shares are taken in several passes, with the
    same sum of gradients. Bounds memory. Without it a rank's whole share goes in one pass, or,
    where the batch changes, the share of the start batch."""
    measure: Literal["auto", "on", "off"] = "auto"
    """Whether gradient noise is measured. "auto": where it costs neither a message nor a pass, and
    where the policy decides by it; at fewer steps where it takes over 1 % of the time. "on":
    always and at every step, so that decisions by noise alone are the same in every run."""
    check_every: int = Field(default=10, ge=1)
    """Steps between two looks at what was measured."""

    adaptive: ClassVar[bool] = False
    """Whether the batch changes during a run."""
    replays: ClassVar[bool] = False
    """Whether `Decision.gain` is the whole factor of a recorded run, beside which no other gain
    applies."""

    @property
    def needs(self) -> frozenset[Need]:
        """What `decide` has to see. Local."""
        return frozenset()

    @property
    def largest(self) -> int:
        """No step takes more samples than these. Local."""
        return self.batch_global

    @model_validator(mode="after")
    def _micro_within_largest(self) -> BatchTable:
        if self.micro_batch is not None and self.micro_batch > self.largest:
            key = "batch_max" if self.adaptive else "batch_global"
            raise ValueError(
                f"micro_batch = {self.micro_batch} is more than {key} = {self.largest}; a rank "
                "never has so many samples at once"
            )
        return self

    @model_validator(mode="after")
    def _measures_what_it_needs(self) -> BatchTable:
        if self.measure == "off" and "noise" in self.needs:
            raise ValueError(
                f'measure = "off" and kind = "{getattr(self, "kind", "")}" contradict: this policy '
                "decides by the measured gradient noise; drop measure"
            )
        return self

    def micro_for(self, ranks: int) -> int | None:
        """Most samples per forward pass at so many ranks; None: no bound. Local."""
        if self.micro_batch is None and self.adaptive:
            return -(-self.batch_global // ranks)
        return self.micro_batch

    def require_fit(self, train: Train, lr: LrConfig, *, exact: bool, own_pace: bool) -> None:
        """Check the other tables against this one. Local.

        Args:
            train: The table [train].
            lr: The table [lr].
            exact: Whether the exchange leaves the mean gradient of all ranks on every rank.
            own_pace: Whether a [[sync]] rule lets ranks make unequal numbers of steps.

        Raises:
            ValueError: with what is allowed.
        """
        kind = getattr(self, "kind", "")
        if self.needs & {"epoch", "oracle"} and not exact:
            raise ValueError(
                f'batch.kind = "{kind}" adds up the mean gradients of all ranks, which this '
                'exchange leaves on none: set exchange.kind = "dense" with scope = "world", or '
                'batch.kind = "goodput", "normtest", "cosine", "adabatch" or "fixed"'
            )
        if self.adaptive and own_pace:
            raise ValueError(
                f'batch.kind = "{kind}" changes the batch of all ranks at one step, and a [[sync]] '
                "rule lets them go at their own pace: set its unit to steps and asynchronous to "
                'false, or batch.kind = "fixed"'
            )
        if self.adaptive and train.steps is not None and lr.schedule == "cosine":
            raise ValueError(
                f'train.steps with batch.kind = "{kind}" does not say how many samples the run '
                'takes, and lr.schedule = "cosine" runs over them: give train.samples or epochs'
            )
        if lr.kind == "adascale" and self.measure == "off" and not self.replays:
            raise ValueError(
                'lr.kind = "adascale" goes by the measured noise, and batch.measure = "off"; drop '
                "measure"
            )

    def require_ranks(self, ranks: int) -> None:
        """Check the bounds against the number of ranks. Local.

        Raises:
            ConfigError: they leave a rank without its share.
        """


class AdaptiveTable(BatchTable):
    """Keys of every table [batch] whose policy chooses the batch within bounds."""

    batch_min: int | None = Field(default=None, ge=1)
    """The smallest batch_global; by default the start batch."""
    batch_max: int = Field(ge=1)
    """The largest batch_global; holds always."""

    adaptive: ClassVar[bool] = True

    @property
    def smallest(self) -> int:
        """No full step takes fewer samples than these. Local."""
        return self.batch_min if self.batch_min is not None else self.batch_global

    @property
    def largest(self) -> int:
        """No step takes more samples than these. Local."""
        return self.batch_max

    @model_validator(mode="after")
    def _bounds_in_order(self) -> AdaptiveTable:
        if self.batch_max < self.batch_global:
            raise ValueError(
                f"batch_max = {self.batch_max} is below the start, batch_global = "
                f"{self.batch_global}; raise the one or lower the other"
            )
        if self.smallest > self.batch_global:
            raise ValueError(
                f"batch_min = {self.batch_min} is above the start, batch_global = "
                f"{self.batch_global}; lower the one or raise the other"
            )
        return self

    def within(self, batch: float) -> int:
        """The nearest whole batch within the bounds. Local."""
        return int(min(max(batch, self.smallest), self.batch_max))

    def require_ranks(self, ranks: int) -> None:
        """Check the bounds against the number of ranks. Local.

        Raises:
            ConfigError: batch_min is below one sample per rank, or batch_max below one micro-batch
                per rank.
        """
        if self.smallest < ranks:
            key = "batch_global" if self.batch_min is None else "batch_min"
            raise ConfigError(
                f"batch.{key} = {self.smallest} leaves some of {ranks} ranks without a sample; set "
                f"it to {ranks} or more, or start fewer ranks"
            )
        least = ranks * (self.micro_batch or 1)
        if self.batch_max < least:
            raise ConfigError(
                f"batch.batch_max = {self.batch_max} is below one micro-batch on each of {ranks} "
                f"ranks ({ranks} x {self.micro_batch or 1} = {least}); raise batch_max, lower "
                "micro_batch or start fewer ranks"
            )
