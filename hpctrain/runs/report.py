"""What `hpctrain status`, `stop` and `logs` print about a run folder. No torch, no MPI, no rich."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

from hpctrain.errors import UsageError
from hpctrain.runs import manifest
from hpctrain.runs.durable import write_durably
from hpctrain.runs.folder import RunFolder, cannot_write, log_path
from hpctrain.runs.lines import Line, read
from hpctrain.runs.status import Status, is_running, read_status

_NEARBY = 8


def status(path: Path) -> str:
    """Where a run stands, as aligned lines. Local.

    Raises:
        UsageError: there is no run; names those nearby.
    """
    found = _status_of(path)
    rows = [("run", str(path)), ("state", _state_text(path, found))]
    progress = f"{found.step:,}, epoch {found.epoch:.2f}, {found.samples:,} samples"
    rows.append(("step", f"{progress} ({_age(found.updated_s)} ago)"))
    rows += _last_lines(path)
    saved = manifest.checkpoints(path / "checkpoints")
    if saved:
        age = _age(saved[0].stat().st_mtime)
        rows.append(("checkpoint", f"{saved[0].name} ({age} ago), {len(saved)} kept"))
    else:
        rows.append(("checkpoint", "none"))
    if found.exit_code is not None:
        rows.append(("exit code", str(found.exit_code)))
    if found.job_id:
        rows.append(("job", found.job_id))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def stop(path: Path) -> str:
    """Ask a run to save and exit with 75 by its STOP file; what happens next, in words. Local.

    Raises:
        UsageError: there is no run, or it is not running.
        WriteError: the folder cannot be written.
    """
    found = _status_of(path)
    if found.state != "running":
        raise UsageError(f"{path}: is not running ({_state_text(path, found)}); nothing to stop")
    if is_running(found) is False:
        raise UsageError(f"{path}: nothing to stop; {_state_text(path, found)}")
    folder = RunFolder(path)
    try:
        write_durably(folder.stop_file, b"")
    except OSError as error:
        raise cannot_write(folder.stop_file, error) from None
    return f"{path}: asked to stop; it saves after the present step and exits with 75"


def logs(path: Path, rank: int = 0, lines: int = 40) -> str:
    """The last lines of one rank's log. Local.

    Raises:
        UsageError: there is no run, or no log of that rank; names the ranks that have one.
    """
    _status_of(path)
    file = log_path(path, rank)
    try:
        with open(file, encoding="utf-8", errors="replace") as text:
            return "".join(deque(text, lines)).rstrip("\n")
    except OSError:
        names = sorted(other.stem for other in file.parent.glob("rank-*.log"))
        ranks = [str(int(name.removeprefix("rank-"))) for name in names]
        have = f"there are logs of rank {', '.join(ranks)}" if ranks else "there are no logs"
        raise UsageError(f"{path}: no log of rank {rank}; {have}") from None


def _status_of(path: Path) -> Status:
    found = read_status(path)
    if found is not None:
        return found
    what = "is no run folder (no readable status.json)" if path.is_dir() else "does not exist"
    near = nearby(path)
    hint = f"; runs nearby: {', '.join(map(str, near))}" if near else "; no runs are nearby"
    raise UsageError(f"{path}: {what}{hint}")


def nearby(path: Path) -> list[Path]:
    """Run folders inside `path`, beside it, or in ./runs, newest first, at most 8. Local."""
    places = dict.fromkeys([path, path.parent, Path("runs")])
    found = [p for place in places if place.is_dir() for p in place.glob("*/status.json")]
    newest = sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)
    return list(dict.fromkeys(file.parent for file in newest))[:_NEARBY]


def _state_text(path: Path, found: Status) -> str:
    if found.state != "running":
        return f"{found.state} (attempt {found.attempt})"
    process = f"process {found.pid} on {found.host}"
    alive = is_running(found)
    if alive is None:
        return f"running when last heard of (attempt {found.attempt}, {process})"
    if alive:
        return f"running (attempt {found.attempt}, {process})"
    return (
        f"killed without a word: {process} is gone; start it again with --out {path} --resume auto"
    )


def _last_lines(path: Path) -> list[tuple[str, str]]:
    last: dict[str, Line] = {}
    try:
        for line in read(path / "metrics.jsonl"):
            last[line["kind"]] = line
    except OSError:
        return []
    rows = []
    for kind, name in (("step", "training"), ("eval", "evaluation")):
        if kind in last:
            fields = ("loss", "accuracy", "lr", "samples_per_s")
            values = [f"{f} {last[kind][f]:.4g}" for f in fields if last[kind].get(f) is not None]
            rows.append((name, f"{', '.join(values)} (step {last[kind]['step']:,})"))
    return rows


def _age(then_s: float) -> str:
    seconds = max(time.time() - then_s, 0.0)
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
