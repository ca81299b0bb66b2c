"""Reads LIBSVM text: every line is checked first, so that a mistake can be named by its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.data.files import Stream
from hpctrain.errors import DataError

_NUMBER = rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_LINE = re.compile(rb"\s*(" + _NUMBER + rb")((?:\s+\d+:" + _NUMBER + rb")*)\s*")
_PAIR = re.compile(rb"(\d+):" + _NUMBER)
_INDEX = re.compile(rb"(\d+):")


@dataclass(frozen=True)
class Examples:
    """A file's examples."""

    path: Path
    rows: Any
    """(n, n_features) float32, sparse rows (SciPy)."""
    labels: np.ndarray
    """(n,) float64, as written."""
    lines: np.ndarray
    """(n,) line number of each example, from 1."""
    n_features: int


def read_examples(path: Path, *, first_index: int, n_features: int | None) -> Examples:
    """Check and parse a file. Local.

    Raises:
        DataError: names the file, the line and what is wrong with it.
    """
    with Stream(path) as stream:
        text = b"".join(stream.chunks())
    lines, last = _check(path, text, first_index, n_features)
    if not lines:
        raise DataError(f"{path}: holds no example")
    from sklearn.datasets import load_svmlight_file  # a second to import: on one rank only

    width = n_features or max(1, last + 1 - first_index)
    rows, labels = load_svmlight_file(
        BytesIO(text), n_features=width, dtype=np.float64, zero_based=first_index == 0
    )
    assert len(labels) == len(lines), "scikit-learn counts other lines as examples"
    bad = np.flatnonzero(~(np.abs(rows.data) <= np.finfo(np.float32).max))
    if len(bad):
        row = int(np.searchsorted(rows.indptr, bad[0], side="right")) - 1
        raise DataError(f"{path}: line {lines[row]}: a value is too large for float32")
    return Examples(path, rows.astype(np.float32), labels, np.array(lines), width)


def _check(
    path: Path, text: bytes, first_index: int, n_features: int | None
) -> tuple[list[int], int]:
    """Line number of each example, and the highest index."""
    lines: list[int] = []
    highest = first_index - 1
    end = first_index + n_features if n_features is not None else None
    for number, raw in enumerate(text.split(b"\n"), start=1):
        line = raw.partition(b"#")[0]
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{path}: line {number}: {_fault(line)}")
        indices = [int(index) for index in _INDEX.findall(match[2])]
        lines.append(number)
        if not indices:
            continue
        if any(a >= b for a, b in zip(indices, indices[1:], strict=False)):
            raise DataError(f"{path}: line {number}: indices must ascend, without repetition")
        if indices[0] < first_index:
            raise DataError(
                f"{path}: line {number}: index {indices[0]}, but the first feature has index "
                f"{first_index}; set data.first_index = 0 if the file counts from 0"
            )
        if end is not None and indices[-1] >= end:
            raise DataError(
                f"{path}: line {number}: index {indices[-1]} is beyond data.n_features = "
                f"{n_features} (counted from {first_index})"
            )
        highest = max(highest, indices[-1])
    return lines, highest


def _fault(line: bytes) -> str:
    """What is wrong with a line that is no example."""
    label, *pairs = line.split()
    form = "an example is 'label index:value index:value ...' with numbers"
    if not re.fullmatch(_NUMBER, label):
        return f"{label.decode(errors='replace')!r} is not a label; {form}"
    wrong = next((pair for pair in pairs if not _PAIR.fullmatch(pair)), line)
    return f"{wrong.decode(errors='replace')[:60]!r} is not index:value; {form}"
