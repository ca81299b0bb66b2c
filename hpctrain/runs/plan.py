"""batch_plan.jsonl: a JSON line per decision of the batch policy, enough to repeat the run.

Every line has `step` and `samples` (before the step it is for), `batch_global`, `lr_gain` (what the
step size is multiplied by) and `reason`; the numbers behind it follow. `[batch] kind = "replay"`
reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hpctrain.runs.lines import JsonLines


class Plan(JsonLines):
    """Appends to batch_plan.jsonl; rank 0 only. Use it in a `with` block.

    Args:
        path: The file.
        step: Where this attempt starts. Lines of that step and later are cut off: it is decided
            anew, and alike.

    Raises:
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(path, step=step - 1)

    def write(
        self,
        *,
        step: int,
        samples: int,
        batch_global: int,
        lr_gain: float,
        reason: str,
        facts: Mapping[str, float | bool | str | None],
    ) -> None:
        """Append a line. Local."""
        decided = {"step": step, "samples": samples, "batch_global": batch_global}
        self.append(decided | {"lr_gain": lr_gain, "reason": reason} | dict(facts))
