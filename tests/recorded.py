"""What a run recorded, read back from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The run's recorded lines of one kind; one that is still being written is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [record for record in records if record["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; of a step taken twice, the last."""
    return {line["step"]: line["loss"] for line in lines(run)}
