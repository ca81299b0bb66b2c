"""The density over a run: an exponential warm-up, and tuning by descent per cost.

    warm-up:  1/4, 1/16, 1/64, ... in equally long stages while above the target; then the target;
              a stage that would not send less than the dense exchange runs dense
    tuned:    T of a bucket = argmax descent(T) / cost(T), between two densities

Source: Lin et al. 2018, "Deep Gradient Compression" (arXiv 1712.01887), section 3.3 (warm-up; there
a stage is an epoch and no stage is dense); Khirirat et al. 2021 (arXiv 2003.06377) for the tuning.
Local: nothing here communicates; ranks tune on their own gradients and may differ in T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import Field, model_validator

from hpctrain.exchange.density import (
    BitCost,
    Compressor,
    Cost,
    PacketCost,
    SecondCost,
    best_count,
)
from hpctrain.table import Table

FIRST_STAGE = 0.25
"""Density of the first stage of warm-up, and what each stage's is of the one before."""


class Tuned(Table):
    """[exchange.tune]: choose the density from the gradient itself."""

    cost: Literal["seconds", "bits", "packets"] = "seconds"
    """What descent is weighed against: measured seconds of the step, bits, or network packets."""
    lowest: float = Field(default=1e-4, gt=0.0, le=1.0)
    """Least density."""
    highest: float = Field(default=0.1, gt=0.0, le=1.0)
    """Largest density; messages have room for it."""
    header_bytes: int = Field(default=64, ge=0)
    """Bytes that a message ("bits") or a packet ("packets") costs besides its content."""
    packet_bytes: int = Field(default=512, ge=1)
    """Content of a packet."""

    @model_validator(mode="after")
    def _range(self) -> Tuned:
        if self.lowest > self.highest:
            raise ValueError(
                f"lowest = {self.lowest:g} is above highest = {self.highest:g}; swap them"
            )
        return self

    def cost_of(self, seconds: SecondCost) -> Cost:
        """The cost that `cost` names; `seconds` holds what was measured. Local."""
        header_bits = 8.0 * self.header_bytes
        if self.cost == "bits":
            return BitCost(1.0, header_bits)
        if self.cost == "packets":
            packet_bits = 8 * self.packet_bytes
            return PacketCost(packet_bits + header_bits, header_bits, packet_bits)
        return seconds


@dataclass(frozen=True)
class TunedDensity:
    """Proposes this rank's count for a bucket. Local, pure.

    Args:
        cost: From `Tuned.cost_of`.
        lowest: Least density.
        highest: Largest density.
        compressor: What is sent.
        index_bits: Bits of an index on the wire; ceil(log2 n) by default.
        value_bits: Bits of a value on the wire.
    """

    cost: Cost
    lowest: float
    highest: float
    compressor: Compressor = "top"
    index_bits: int | None = None
    value_bits: int = 32

    def propose(self, sample_magnitudes: NDArray[Any], n: int) -> int:
        """How many of n entries to keep: `best_count` between the two densities, rounded up.

        Args:
            sample_magnitudes: All n magnitudes, or an evenly spread sample of them.
            n: Entries of the bucket.
        """
        return best_count(
            sample_magnitudes,
            n,
            self.compressor,
            self.cost,
            math.ceil(self.lowest * n),
            math.ceil(self.highest * n),
            index_bits=self.index_bits,
            value_bits=self.value_bits,
        )


@dataclass(frozen=True)
class Warmup:
    """The density at each step. Local, pure.

    Args:
        target: Density after warm-up.
        steps: Length of warm-up; 0 for none.
        volume: What the sparse exchange sends at a density, over what the dense one sends: P d for
            a gather over P ranks, 3/2 d for exclusive, 2 d for owner (pairs of 8 bytes, float32).

    Raises:
        ValueError: there is a warm-up but no stage above the target.
    """

    target: float
    steps: int
    volume: Callable[[float], float]

    def __post_init__(self) -> None:
        if self.steps and not self.stages:
            raise ValueError(
                f"warmup_steps = {self.steps} has no effect: the first stage has density "
                f"{FIRST_STAGE:g}, no more than density = {self.target:g}; set warmup_steps = 0"
            )

    @property
    def stages(self) -> list[float]:
        """Densities of the stages, in their order; 1 for a stage that runs dense."""
        found = []
        density = FIRST_STAGE
        while self.steps and density > self.target:
            found.append(density if self.volume(density) < 1.0 else 1.0)
            density *= FIRST_STAGE
        return found

    def density_at(self, step: int) -> float:
        """The density of a step, counted from 0."""
        if step >= self.steps:
            return self.target
        return self.stages[step * len(self.stages) // self.steps]
