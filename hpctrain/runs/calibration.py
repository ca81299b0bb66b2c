"""calibration.json: what `hpctrain calibrate` was asked, tried and found (docs/calibrate.md)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpctrain.errors import UsageError
from hpctrain.runs.durable import write_durably
from hpctrain.runs.folder import cannot_write
from hpctrain.stats.noise import NoiseEstimate
from hpctrain.stats.words import noise_in_words

FILE = "calibration.json"
"""Its name in the run folder."""

LrRule = Literal["linear", "sqrt", "adascale", "none"]


@dataclass(frozen=True)
class Tolerance:
    """How much higher than the first branch's a loss may be."""

    value: float
    relative: bool = False
    """Whether `value` is a fraction of the first branch's loss."""

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """`0.01` or `1%`. Local.

        Raises:
            UsageError: it is neither, or not positive.
        """
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not 0.0 < value < math.inf:
            raise UsageError(
                f"--tolerance {text}: give a loss above 0, as in 0.01, or a share of it, as in 1%"
            )
        return cls(value / 100.0, True) if text.endswith("%") else cls(value)

    def allows(self, loss: float, first: float) -> bool:
        """Whether a loss keeps up with the first branch's; never one that is not finite. Local."""
        margin = self.value * abs(first) if self.relative else self.value
        return math.isfinite(loss) and loss <= first + margin

    def __str__(self) -> str:
        return f"{100.0 * self.value:g}%" if self.relative else f"{self.value:g}"


@dataclass(frozen=True)
class Wanted:
    """What is to be tried.

    Raises:
        UsageError: a value is out of bounds.
    """

    most: int = 16
    """The largest multiple of the run's batch, a power of two."""
    samples: int | None = None
    """Of each branch; None: half an epoch, and at least 8 steps of the largest batch."""
    lr: LrRule | None = None
    """How the step size follows the batch; None: linear for SGD, sqrt for AdamW."""
    tolerance: Tolerance = Tolerance(0.01)

    def __post_init__(self) -> None:
        if self.most < 2 or self.most & (self.most - 1):
            raise UsageError(f"--most {self.most}: give a power of two, 2 or more")
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"--samples {self.samples}: give the samples of a branch, 1 or more")

    @property
    def multiples(self) -> list[int]:
        """1, 2, 4, ... up to `most`."""
        return [2**power for power in range(self.most.bit_length())]

    def samples_for(self, batch: int, samples_per_epoch: int, left: float) -> int:
        """Samples of each branch; where not given, a whole number of blocks. Local, pure.

        Args:
            batch: The run's own; `most` times as many are a block.
            samples_per_epoch: Of the training set.
            left: Until the schedule of the step size ends; inf where it does not.

        Raises:
            UsageError: less than two blocks, or more than are left.
        """
        block = self.most * batch
        up_to = f"branches up to {self.most} x {batch} samples a step"
        if left < 2 * block:
            raise UsageError(
                f"the cosine of [lr] ends {left:.0f} samples after this checkpoint, and {up_to} "
                f"need {2 * block}; lower --most, or take an earlier checkpoint"
            )
        if self.samples is None:
            blocks = max(math.ceil(samples_per_epoch / 2 / block), 8)
            return int(min(blocks, left // block)) * block
        if not 2 * block <= self.samples <= left:
            end = f", and at most {left:.0f}: there the cosine of [lr] ends" * (left < math.inf)
            raise UsageError(f"--samples {self.samples}: {up_to} need at least {2 * block}{end}")
        return self.samples


@dataclass(frozen=True)
class Branch:
    """What one batch came to."""

    batch_global: int
    lr: float
    """Of its first step."""
    losses: list[float]
    """Mean training loss of every step, before its update; not in the file."""
    block_losses: list[float]
    """The same of every block of samples; blocks are the same in all branches."""
    loss: float
    """These, smoothed; inf where a loss or a gradient was inf or NaN."""
    held_out_loss: float | None
    """At its end; None where it did not get there."""

    def row(self, first: Branch) -> str:
        """Its line of the report, beside the first branch. Local."""
        more = "" if self is first else f"{self.loss - first.loss:+.4f}"
        held_out = "" if self.held_out_loss is None else f"{self.held_out_loss:.4f}"
        numbers = f"{self.batch_global:>9} {self.lr:>9.4g} {len(self.losses):>7}"
        return f"{numbers} {self.loss:>9.4f} {more:>9} {held_out:>9}".rstrip()


HEADINGS = f"{'batch':>9} {'lr':>9} {'steps':>7} {'loss':>9} {'more':>9} {'held out':>9}"


@dataclass(frozen=True)
class Calibration:
    """What was found. Equal on all ranks."""

    run: str
    step: int
    """Of the checkpoint."""
    ranks: int
    samples: int
    """Of each branch."""
    lr: LrRule
    tolerance: str
    branches: list[Branch]
    """By batch, each twice the one before; the last may be too large."""
    too_large: int | None
    """The first batch that was not within the tolerance; None where all were."""
    noise: NoiseEstimate | None
    """As measured at the end of the first branch; None where the run does not measure it."""

    @property
    def critical_batch(self) -> int:
        """The largest batch up to which all were within the tolerance."""
        within = [b.batch_global for b in self.branches if b.batch_global != self.too_large]
        return within[-1]

    @property
    def bound(self) -> Literal["found", "at least", "less than twice"]:
        """What `critical_batch` is: between two batches, or all or none of those tried."""
        if self.too_large is None:
            return "at least"
        return "less than twice" if len(self.branches) == 2 else "found"

    @property
    def noise_scale_factor(self) -> float | None:
        """critical_batch / (B_S - 1), a bound as that is; None where B_S is not known."""
        if self.noise is None or not self.noise.resolved:
            return None
        return self.critical_batch / (self.noise.b_s - 1.0)

    def to_json(self) -> str:
        """Infinite and undefined numbers become null. Local."""
        content = asdict(self)
        for branch in content["branches"]:
            branch["steps"] = len(branch.pop("losses"))
        for name in ("critical_batch", "bound", "noise_scale_factor"):
            content[name] = getattr(self, name)
        return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"

    def write(self, folder: Path) -> None:
        """Into a run folder. Local.

        Raises:
            WriteError: it cannot be written.
        """
        try:
            write_durably(folder / FILE, self.to_json().encode())
        except OSError as error:
            raise cannot_write(folder / FILE, error) from None

    def lines(self) -> list[str]:
        """The outcome in words. Local."""
        small = self.critical_batch
        found = {
            "found": f"critical  {small} samples; {self.too_large} is too large",
            "at least": f"critical  at least {small} samples; raise --most to see where it ends",
            "less than twice": f"critical  less than {self.too_large} samples",
        }[self.bound]
        if self.noise is None:
            return [found, "measured  B_S is not known; with --set batch.measure=on it is measured"]
        lines = [found, f"measured  {noise_in_words(self.noise)}"]
        if self.noise_scale_factor is not None:
            note = {"found": "", "at least": "  # or more", "less than twice": "  # or less"}
            factor = f"{self.noise_scale_factor:.3g}{note[self.bound]}"
            lines.append(f"config    batch.noise_scale_factor = {factor}")
        return lines


def block_means(loss_T: np.ndarray, samples_T: np.ndarray, block: int) -> list[float]:
    """Mean loss of each block of samples, [] without a step. Local, pure.

    Args:
        loss_T: Sum of the losses of each step's samples.
        samples_T: Samples of each step; a step that spans two blocks is shared out by samples.
        block: Samples of a block; the last one may be shorter.
    """
    ends = np.concatenate([[0.0], np.cumsum(samples_T)])
    edges = np.append(np.arange(0.0, ends[-1], block), ends[-1])
    at_edges = np.interp(edges, ends, np.concatenate([[0.0], np.cumsum(loss_T)]))
    means: list[float] = (np.diff(at_edges) / np.diff(edges)).tolist()
    return means


def smoothed(means: list[float]) -> float:
    """Exponential average with weight 1/2, starting at the first. Local, pure."""
    average = means[0]
    for mean in means[1:]:
        average = (average + mean) / 2.0
    return average


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
