"""The variants of configs/flagship.toml, and the log of what was run: a JSON line each."""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.peers.target import Target
from hpctrain.config import Loaded, load
from hpctrain.toml_text import to_toml

Line = dict[str, Any]

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "flagship.toml"
TARGET = Target("accuracy", 0.88)
NODES = 4
SEEDS = (0, 1, 2)
SKIPPED, ROUND = 32, 64
"""Steps of a timing that do not count, and those that do: from one meeting of leaders to the next.
"""
LRS = (0.03, 0.06, 0.12)
"""The same grid for every variant, for a batch of 256."""

FLAGSHIP, FIXED, OFF = "flagship", "fixed batch", "all off"
EVERY_RANK = "every rank for itself"
"""Only its bytes are counted: on nodes of one rank it is the flagship."""
_NO_LEADERS = ("exchange.scope=world", "sync=[]")
_FIXED = ("batch.kind=fixed", "batch.batch_global=256")
VARIANTS: dict[str, tuple[str, ...]] = {
    FLAGSHIP: (),
    EVERY_RANK: ("exchange.hierarchy=false",),
    "dense instead of top-k": (
        "exchange.kind=dense",
        "exchange.dense_backend=mpi",
        "exchange.scope=group",
    ),
    "no leaders": _NO_LEADERS,
    FIXED: _FIXED,
    OFF: ("exchange.kind=dense", *_NO_LEADERS, *_FIXED),
}
"""What is set on top of the configuration."""
TRAINED = [variant for variant in VARIANTS if variant != EVERY_RANK]

COMMON = (
    "lr.schedule=constant",
    "lr.warmup_samples=6400",
    "train.threads=1",
    "evaluate.every_epochs=0.1",
    "evaluate.replicas=never",
    "data.limit_test=5000",
    "checkpoint.at_end=false",
    "record.progress=none",
)
UNMEASURED = ("batch.kind=fixed", "batch.measure=off", "lr.kind=none")
"""For steps whose bytes or seconds are counted; the batch is set beside."""


@dataclass(frozen=True)
class Case:
    """One training."""

    variant: str
    lr: float = LRS[1]
    seed: int = SEEDS[0]

    def loaded(self, *more: str, length: str = "train.epochs=6") -> Loaded:
        """Its configuration, with more set on top."""
        own = (f"lr.base={self.lr}", f"seed={self.seed}", length)
        return load(CONFIG, [*COMMON, *VARIANTS[self.variant], *own, *more])

    def key(self, what: str, *told: str) -> Line:
        """What tells its line in the log from others."""
        text = to_toml(self.loaded().run) + " ".join(told)
        return {"what": what, **vars(self), "fingerprint": f"{zlib.crc32(text.encode()):08x}"}


class Log:
    """Finished runs."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self, **key: Any) -> list[Line]:
        """Those with these entries, oldest first."""
        if not self._path.exists():
            return []
        lines = map(json.loads, self._path.read_text().splitlines())
        return [line for line in lines if all(line.get(k) == v for k, v in key.items())]

    def find(self, key: Line) -> Line | None:
        """The newest line of a key; None where there is none."""
        found = self.lines(**key)
        return found[-1] if found else None

    def once(self, key: Line, run: Callable[[], Line]) -> Line:
        """The newest line of a key; made now where there is none."""
        if found := self.find(key):
            return found
        load_average = os.getloadavg()[0]
        line = key | run() | {"load_average": load_average, "machine": describe_machine()}
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = {k: v for k, v in line.items() if isinstance(v, (str, int, float, bool))}
        print(shown, file=sys.stderr, flush=True)
        return line
