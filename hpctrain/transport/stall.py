"""Who waits for whom: the pure half of the stall watchdog."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

SILENT_BEATS = 4
"""A rank whose heartbeat is so many intervals late does not answer."""


@dataclass(frozen=True)
class Place:
    """Where one rank stands, as it says itself."""

    step: int
    phase: str
    bucket: int
    """Bucket that is waited for, -1 when none."""
    idle_s: float
    """Since this rank's main thread moved."""
    waits: bool
    """Whether its main thread is inside a communication call."""
    at: str
    """Where its main thread is: file, line and function."""

    def encode(self) -> bytes:
        """For the mailbox. Local."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(payload: bytes) -> Place:
        """The opposite of `encode`. Local."""
        return Place(**json.loads(payload))


@dataclass(frozen=True)
class Heard:
    """The last place heard of a rank; `place` is None as long as it never spoke."""

    place: Place | None
    silent_s: float
    """Since it was heard."""

    @property
    def idle_s(self) -> float:
        """How long the rank has not moved, at least; silence counts."""
        return self.silent_s + (self.place.idle_s if self.place is not None else 0.0)


@dataclass(frozen=True)
class Stall:
    """A run that does not move."""

    message: str
    longest_s: float
    """How long the rank that moved last has stood still."""
    key: tuple[object, ...]
    """Equal as long as the same ranks stand at the same places."""


def classify(
    heard: Sequence[Heard],
    *,
    hosts: Sequence[str],
    bucket_names: Sequence[str],
    warn_s: float,
    heartbeat_s: float,
) -> Stall | None:
    """Say who waits, in what and since when, and who is missing. Local, pure.

    Missing are ranks that do not answer, ranks that are not inside a communication call, and
    ranks that wait in an earlier step or bucket than others.

    Returns:
        None while some rank has moved within `warn_s`.
    """
    still_s = min(one.idle_s for one in heard)
    if still_s < warn_s:
        return None
    silent = [one.silent_s > SILENT_BEATS * heartbeat_s for one in heard]
    places = [
        None if is_silent else one.place for one, is_silent in zip(heard, silent, strict=True)
    ]
    furthest = max(
        ((place.step, place.bucket) for place in places if place is not None and place.waits),
        default=None,
    )
    waiting: dict[tuple[int, str, int], list[int]] = defaultdict(list)
    missing: list[int] = []
    for rank, place in enumerate(places):
        if place is not None and place.waits and (place.step, place.bucket) == furthest:
            waiting[place.step, place.phase, place.bucket].append(rank)
        else:
            missing.append(rank)

    lines = [f"no progress for {still_s:.0f} s"]
    for (step, phase, bucket), ranks in waiting.items():
        since_s = max(heard[rank].idle_s for rank in ranks)
        lines.append(
            f"  {_ranks(ranks)} in {phase} of step {step}{_bucket(bucket, bucket_names)} "
            f"for {since_s:.0f} s"
        )
    if missing and waiting:
        lines[0] += f": {_count(waiting)} rank(s) wait for {len(missing)}"
    lines += [f"  {_describe(rank, heard[rank], silent[rank], hosts)}" for rank in missing]
    if not missing:
        lines.append("  no rank is missing: the network or the library that moves it stands still")
    elif not waiting:
        lines.append("  no rank is seen waiting for another")
    key = (tuple(missing), tuple((place, tuple(ranks)) for place, ranks in waiting.items()))
    return Stall("\n".join(lines), still_s, key)


def _describe(rank: int, heard: Heard, silent: bool, hosts: Sequence[str]) -> str:
    who = f"missing: rank {rank} ({hosts[rank]})"
    place = heard.place
    if place is None:
        return f"{who} has not answered since the start, {heard.silent_s:.0f} s ago"
    where = f"{place.phase} of step {place.step}"
    if silent:
        return f"{who} does not answer since {heard.silent_s:.0f} s; last seen in {where}"
    return f"{who} in {where} for {heard.idle_s:.0f} s, at {place.at}"


def _bucket(bucket: int, names: Sequence[str]) -> str:
    return f", bucket {bucket} ({names[bucket]})" if 0 <= bucket < len(names) else ""


def _count(waiting: dict[tuple[int, str, int], list[int]]) -> int:
    return sum(len(ranks) for ranks in waiting.values())


def _ranks(ranks: Sequence[int]) -> str:
    """Such as "waiting: ranks 0, 2-5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"waiting: rank{'s' if len(ranks) > 1 else ''} {shown}"
