"""The batches and step sizes of a recorded run, again.

batch_plan.jsonl holds a line for every decision: from which sample on, which batch, and which
factor of the step size. A step takes the last line at or before its first sample. The decisions of
policies that go by measured times differ from run to run; with them read back, the same
configuration, seed and number of ranks give the same parameters bit for bit.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hpctrain.batch.policy import Decision, Seen
from hpctrain.batch.table import BatchTable
from hpctrain.errors import ConfigError
from hpctrain.state import State

PLAN = "batch_plan.jsonl"
"""The file of a run folder that holds the plan."""


class Replay(BatchTable):
    """[batch] kind = "replay": the batches of a recorded run."""

    kind: Literal["replay"] = "replay"
    """The policy."""
    plan: str
    """A batch_plan.jsonl, or the folder of the run that wrote one. `batch_global` is its start."""

    adaptive: ClassVar[bool] = True
    replays: ClassVar[bool] = True

    @property
    def largest(self) -> int:
        """What the plan asks for is its own affair; no bound on micro_batch. Local."""
        return max(self.batch_global, self.micro_batch or 0)

    def build(self) -> ReplayPolicy:
        """The running policy. Local; reads the plan.

        Raises:
            ConfigError: the plan cannot be read, or is not one of a run with this start batch.
        """
        path = Path(self.plan)
        path = path / PLAN if path.is_dir() else path
        lines = read_plan(path)
        if lines[0].batch_global != self.batch_global:
            raise ConfigError(
                f"{path} starts with batch_global = {lines[0].batch_global}, and [batch] with "
                f"{self.batch_global}; set batch.batch_global = {lines[0].batch_global}"
            )
        return ReplayPolicy(lines)


class Planned(BaseModel):
    """One line of a plan; its other keys are for people."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    samples: int = Field(ge=0)
    """It holds from this sample on."""
    batch_global: int = Field(ge=1)
    lr_gain: float = Field(default=1.0, gt=0.0)
    """`Decision.gain`."""
    reason: str = ""
    splits: bool | None = None
    """`Seen.splits` of the run; on its first line."""


def read_plan(path: Path) -> list[Planned]:
    """The lines of a plan, by ascending samples, the first at 0. Local.

    Raises:
        ConfigError: the file cannot be read or is no plan; names the line.
    """
    try:
        texts = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"batch.plan: {path} cannot be read: {error}. Give the {PLAN} of a run, or its folder"
        ) from None
    lines = [_planned(text, f"{path}:{number}") for number, text in enumerate(texts, start=1)]
    if not lines or lines[0].samples != 0:
        found = f"at sample {lines[0].samples}" if lines else "nowhere"
        raise ConfigError(f"{path} starts {found}; a plan starts at sample 0")
    for number in range(1, len(lines)):
        before, now = lines[number - 1].samples, lines[number].samples
        if now <= before:
            raise ConfigError(
                f"{path}:{number + 1}: samples = {now} after {before}; they must increase"
            )
    return lines


class ReplayPolicy:
    """Follows a plan; remembers how many of its lines it has told.

    Args:
        lines: The plan, as `read_plan` gives it.
    """

    def __init__(self, lines: list[Planned]) -> None:
        self._lines = lines
        self._starts = [line.samples for line in lines]
        self.told = 0

    def decide(self, seen: Seen) -> Decision:
        """What the next step takes. Local.

        Raises:
            ConfigError: the recorded run took other passes than this one.
        """
        splits = self._lines[0].splits
        if splits is not None and splits != seen.splits:
            raise ConfigError(
                "batch.plan is of a run that took some shares in two passes to measure its noise; "
                'set batch.measure = "on" to repeat it bit for bit'
                if splits
                else "batch.plan is of a run that measured nothing on its one rank; drop "
                'batch.measure = "on" to repeat it bit for bit'
            )
        reached = bisect_right(self._starts, seen.samples)
        line = self._lines[reached - 1]
        if reached == self.told:
            return Decision(line.batch_global, line.lr_gain)
        self.told = reached
        why = line.reason or f"{line.batch_global}: as recorded"
        return Decision(line.batch_global, line.lr_gain, why, {"action": "replay"})

    def state(self) -> State:
        """The lines told. Local."""
        return State(counters={"told": self.told})

    def load_state(self, state: State) -> None:
        """Go on from there. Local."""
        self.told = int(state.counters.get("told") or 0)


def _planned(text: str, where: str) -> Planned:
    try:
        return Planned.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{part}: " for part in first["loc"])
        raise ConfigError(f"{where}: {key}{first['msg']}; got {text}") from None
