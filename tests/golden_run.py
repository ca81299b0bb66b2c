"""The short run whose losses are kept in tests/golden/losses.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parent / "golden" / "losses.json"

MLP: dict[str, Any] = {
    "name": "mlp",
    "seed": 7,
    "data": {"kind": "digits"},
    "model": {"kind": "mlp", "widths": [24]},
    "optimiser": {"kind": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "lr": {"base": 0.1, "schedule": "cosine", "warmup_epochs": 0.5},
    "batch": {"batch_global": 50},
    "train": {"steps": 30, "dtype": "float64"},
    "evaluate": {"every_epochs": 0},
    "record": {"every_steps": 1, "progress": "none"},
}


def step_losses(folder: Path) -> list[float]:
    """Every step's loss, as recorded in a run folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]
