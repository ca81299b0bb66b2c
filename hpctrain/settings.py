"""Tables of the run as a whole: `[train]`, `[evaluate]`, `[watchdog]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hpctrain.table import DurationS, Table


class Train(Table):
    """How long, where and in which number format."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training set, fractions allowed; or give samples, or steps."""
    samples: int | None = Field(default=None, ge=1)
    """Training samples to take, over all ranks."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps to take."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPUs, one per rank, where there are any, else the CPU."""
    dtype: Literal["float32", "float64"] = "float32"
    """Format of parameters, gradients and optimiser state."""
    autocast: Literal["off", "bfloat16"] = "off"
    """Run forward and backward in bfloat16 where that is safe (CUDA only)."""
    threads: int | None = Field(default=None, ge=1)
    """Torch threads per rank; by default OMP_NUM_THREADS, else the cores this rank may use."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        given = [k for k in ("epochs", "samples", "steps") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of epochs, samples, steps; got {' and '.join(given) or 'none'}"
            )
        if self.autocast != "off" and self.dtype != "float32":
            raise ValueError('autocast = "bfloat16" needs dtype = "float32"')
        return self


class TopologyConfig(Table):
    """[topology]: groups of ranks, where they are not nodes."""

    groups: list[list[int]] | str = "node"
    """The scope "group": "node", "numa", "switch", "world", "size:N" (N consecutive ranks each),
    "nodes:N" (N consecutive nodes), or lists of ranks that hold every rank once."""


class Evaluate(Table):
    """When the held-out set is measured; always once more at the end."""

    every_epochs: float = Field(default=1.0, ge=0)
    """Evaluate each time so many epochs have passed; 0 = only by steps and at the end."""
    every_steps: int | None = Field(default=None, ge=1)
    """Evaluate each time so many steps have passed, also."""
    batch: int = Field(default=250, ge=1)
    """Samples per forward pass and rank."""
    replicas: Literal["never", "end", "always"] = "end"
    """When every replica is measured beside their average ([[sync]] rules); each measures the whole
    held-out set."""


class Watchdog(Table):
    """What happens when some rank stops moving."""

    heartbeat_s: DurationS = Field(default=5.0, gt=0)
    """Each rank reports its place to rank 0 this often."""
    warn_s: DurationS = Field(default=60.0, gt=0)
    """Name the waiting and the missing ranks once the run has stood still so long."""
    abort_s: DurationS = Field(default=1800.0, ge=0)
    """End all ranks (exit code 70) once the run has stood still so long; 0 = never."""

    @model_validator(mode="after")
    def _order(self) -> Watchdog:
        if 0 < self.abort_s <= self.warn_s:
            raise ValueError(
                f"abort_s = {self.abort_s:g}: 0 (never), or more than warn_s = {self.warn_s:g}"
            )
        return self
