"""The step size: a schedule on the sample clock, scaled with the size of the batch.

    lr = base * (batch_global / reference_batch)^p * warm-up * schedule * gain
    p: kind = "none" 0, "linear" 1, "sqrt" 1/2
    kind = "stich": lr = base * (1 + M / reference_batch) / (1 + M / batch + delay) instead, with
    M = critical_batch and delay = exchange.delay: the same as "linear" far below M, flat above it
    (with a delay, base at most 0.6 of the best step size without one: docs/studies)
    kind = "adascale": p = 1, and gain has the factor (B_simple + reference_batch) / (B_simple +
    batch), B_simple the measured B_S - 1 (at least: the lower end of its interval, where it is not
    resolved; 0 before it is known): "linear" far below B_simple, flat above it
    warm-up:   min(1, (samples_seen + batch_global) / warm-up samples); 1 without warm-up
    constant:  1
    cosine:    f + (1 - f) * (1 + cos(pi * t)) / 2, f = final_fraction, t running from 0 to 1
               between the end of warm-up and the end of training
    step:      gamma^(number of milestones passed)

The clock counts samples over all ranks, so a change of the batch size in mid-run moves neither the
end of warm-up nor a milestone. Warm-up counts the step's own samples too, so
that the first step is not lost.

`gain` comes from the run: AdaScale's factor, and what a batch policy adds.

Source: Goyal et al. 2017, arXiv 1706.02677, section 2.1 (linear rule, warm-up; here warm-up starts
at zero, not at the reference rate); Krizhevsky 2014, arXiv 1404.5997 (square root rule); Loshchilov
and Hutter 2016, arXiv 1608.03983, equation 5 (cosine, without restarts); Stich, Mohtashami, Jaggi
2021, arXiv 2103.02351: step sizes up to B / (L (B + M)) for batches and 1 / (L (1 + M + delay)) for
delays, put together as one rule relative to a tuned step size. Johnson, Agrawal, Gu, Guestrin 2020,
arXiv 2007.05105, section 3 (AdaScale's gain, for SGD); there the schedule runs on the sum of gains
and the run ends by it, here both stay on the sample clock, and the gain changes at looks
(`batch.check_every`), not at every step.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpctrain.table import Table

_POWER = {"none": 0.0, "linear": 1.0, "sqrt": 0.5, "stich": 0.0, "adascale": 1.0}


def adascale_gain(batch: float, reference: float, b_simple: float) -> float:
    """What AdaScale takes off a step size in proportion to the batch. Local, pure.

    (b_simple + reference) / (b_simple + batch): reference / batch without noise, which leaves the
    step size at that of the reference, and 1 for noise without end.

    Args:
        batch: Samples of an update.
        reference: `reference_batch`.
        b_simple: B_S - 1, from 0 to inf.
    """
    if math.isinf(b_simple):
        return 1.0
    return 1.0 + (reference - batch) / (b_simple + batch)  # exact for a large b_simple


class LrConfig(Table):
    """[lr]: the step size of every step."""

    kind: Literal["none", "linear", "sqrt", "adascale", "stich"] = "none"
    """How the step size follows `batch_global`: not at all, in proportion, as its root (usual with
    AdamW), by AdaScale's gain from the measured noise (for sgd), or by Stich's rule for a batch and
    a delay."""
    base: float = Field(gt=0.0)
    """The largest step size, for a batch of `reference_batch`."""
    reference_batch: int | None = Field(default=None, ge=1)
    """The batch_global for which `base` was chosen; all kinds but "none" need it."""
    critical_batch: float | None = Field(default=None, gt=0.0)
    """For kind = "stich": the batch (and delay) beyond which more of it gains nothing."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """How the step size falls after warm-up."""
    warmup_epochs: float = Field(default=0.0, ge=0.0)
    """Length of the linear warm-up in passes over the training set."""
    warmup_samples: int = Field(default=0, ge=0)
    """The same in samples; give one of the two."""
    final_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where the cosine ends, as a fraction of the largest step size."""
    milestones: list[Annotated[float, Field(gt=0.0)]] = []
    """Epochs, increasing, at which schedule = "step" multiplies by `gamma`."""
    gamma: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Factor at each milestone."""

    @model_validator(mode="after")
    def _combination(self) -> LrConfig:
        if self.kind == "none" and self.reference_batch is not None:
            raise ValueError(
                'reference_batch has no effect with kind = "none"; drop it or set '
                'kind = "linear", "sqrt" or "adascale"'
            )
        if self.kind != "none" and self.reference_batch is None:
            raise ValueError(
                f'kind = "{self.kind}" needs reference_batch, the batch_global for '
                "which base was chosen"
            )
        if (self.kind == "stich") != (self.critical_batch is not None):
            raise ValueError('kind = "stich" and critical_batch belong together')
        if self.warmup_epochs and self.warmup_samples:
            raise ValueError("give warmup_epochs or warmup_samples, not both")
        if self.final_fraction and self.schedule != "cosine":
            raise ValueError(
                f'final_fraction has no effect with schedule = "{self.schedule}"; '
                'it belongs to "cosine"'
            )
        if bool(self.milestones) != (self.schedule == "step"):
            raise ValueError(
                'milestones (a list of epochs) and schedule = "step" belong together; '
                f'got milestones = {self.milestones}, schedule = "{self.schedule}"'
            )
        if self.gamma != LrConfig.model_fields["gamma"].default and self.schedule != "step":
            raise ValueError(
                f'gamma has no effect with schedule = "{self.schedule}"; it belongs to "step"'
            )
        if any(b <= a for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"milestones must increase; got {self.milestones}")
        return self

    def lr_at(
        self,
        samples_seen: int,
        total_samples: int,
        samples_per_epoch: int,
        batch_global: int,
        batch_update: int | None = None,
        delay: int = 0,
        *,
        gain: float = 1.0,
    ) -> float:
        """The step size of the next step. Local, pure.

        Args:
            samples_seen: Samples, over all ranks, of the steps before this one.
            total_samples: Samples of the whole run.
            samples_per_epoch: Size of the training set.
            batch_global: Samples of this step, over all ranks.
            batch_update: Samples whose mean gradient one update takes, where that is not all of
                them (`[[sync]]`); the scaling goes by it.
            delay: Steps between taking and applying a gradient.
            gain: Multiplies the result: `Decision.gain`, for kind = "adascale" with
                `adascale_gain` in it.
        """
        warmup = self.warmup_samples or self.warmup_epochs * samples_per_epoch
        rising = min(1.0, (samples_seen + batch_global) / warmup) if warmup else 1.0
        falling = 1.0
        if self.schedule == "cosine":
            rest = max(total_samples - warmup, 1)
            done = min(max((samples_seen - warmup) / rest, 0.0), 1.0)
            half_wave = (1.0 + math.cos(math.pi * done)) / 2.0
            falling = self.final_fraction + (1.0 - self.final_fraction) * half_wave
        elif self.schedule == "step":
            passed = sum(samples_seen >= epoch * samples_per_epoch for epoch in self.milestones)
            falling = self.gamma**passed
        batch_update = batch_update or batch_global
        if self.kind == "stich":
            assert self.critical_batch is not None
            assert self.reference_batch is not None
            critical = self.critical_batch
            slowed = 1.0 + critical / batch_update + delay
            return float(
                self.base
                * (1.0 + critical / self.reference_batch)
                / slowed
                * rising
                * falling
                * gain
            )
        scale = (batch_update / (self.reference_batch or batch_update)) ** _POWER[self.kind]
        return float(self.base * scale * rising * falling * gain)
