"""What a check says: a level, one line for people, its fix, and values for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "note", "warning", "fault"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "fault")
"""Mildest first. A fault: training will fail or go wrong; a warning: it may, or is slow."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    """Stable name of the check, the key in --json."""
    level: Level
    text: str
    fix: str = ""
    """What to do, "" where nothing needs doing."""
    values: dict[str, Any] = field(default_factory=dict)
    """What the text says, for programs; only JSON types."""


def worst(findings: Iterable[Finding]) -> Level:
    """The gravest level, "ok" where there is nothing. Local."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def name_ranks(ranks: Sequence[int]) -> str:
    """Local. "rank 3" or "ranks 0-2, 5"; the numbers ascend."""
    return f"rank{'' if len(ranks) == 1 else 's'} {fold(ranks)}"


def fold(numbers: Sequence[int]) -> str:
    """Local. "0-2, 5": consecutive numbers as a range."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def some(names: Sequence[str], shown: int = 4) -> str:
    """Up to `shown` names, and how many there are besides. Local."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def size_text(n_bytes: float) -> str:
    """Local. A size for people: "3.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if n_bytes >= 10 else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} TiB"


def time_text(seconds: float) -> str:
    """Local. A duration for people: "2 h 05 min", "35 s", "4.2 ms", "12 us"."""
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
    if seconds >= 100:
        return f"{seconds / 60:.0f} min"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
