"""Base of every configuration table: a frozen, strict pydantic model whose fields are TOML keys."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Table(BaseModel):
    """One TOML table. Unknown keys and wrong types are refused; a field's docstring is its help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )


_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration_s(text: object) -> object:
    """Seconds from a number, "90s", "30m", "4h", "2d" or "HH:MM:SS". Local.

    Raises:
        ValueError: the text is none of these.
    """
    if not isinstance(text, str):
        return text
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip()):
        return float(match[1]) * _UNITS_S[match[2] or "s"]
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d{2}):(\d{2})", text.strip()):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    raise ValueError(f'"{text}" is not a duration; write 90, "90s", "30m", "4h" or "HH:MM:SS"')


DurationS = Annotated[float, BeforeValidator(parse_duration_s)]
"""A duration in seconds, written as a number or as "30m"."""
