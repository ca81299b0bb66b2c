"""Where output goes and what it may contain: the terminal behind the launcher, width, alphabet.

The rule for the live bar (`record.progress = "auto"`): rank 0 shows a bar when a person watches,
and plain lines otherwise. A person watches when standard output and standard error both end at a
terminal that can move its cursor (TERM set and not "dumb"), outside of batch jobs
(PBS_ENVIRONMENT=PBS_BATCH) and of continuous integration (CI).

Under a launcher this process's own streams do not tell: Open MPI gives ranks a pseudo-terminal even
when its output goes to a file, MPICH gives them a pipe even at a terminal. So the streams of the
launcher itself count, found among this process's ancestors through /proc. Where that is not
possible (srun, rank 0 on another host than the launcher) or the launcher was asked to label its
output, plain lines are shown.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from rich.console import Console

Display = Literal["bar", "plain", "none"]

_LAUNCHERS = {"mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "mpiexec.mpich"}
_LABELLING = ("--tag-output", "--output", "--timestamp-output", "-prepend-rank", "-l", "--xterm")
_ANCESTORS = 8
_WIDTH, _HEIGHT = 120, 25


@dataclass(frozen=True)
class Terminal:
    """The terminal that shows this process's output."""

    path: str
    width: int
    height: int


def choose_display(
    mode: Literal["auto", "bar", "plain", "none"],
    terminal: Terminal | None,
    environment: Mapping[str, str],
) -> Display:
    """What rank 0 shows, by the module's rule. Local."""
    if mode != "auto":
        return mode
    able = environment.get("TERM", "dumb") not in ("", "dumb")
    batch = environment.get("PBS_ENVIRONMENT") == "PBS_BATCH" or bool(environment.get("CI"))
    return "bar" if terminal and able and not batch else "plain"


def find_terminal(launched: bool, proc: Path = Path("/proc")) -> Terminal | None:
    """The terminal behind standard output and standard error, or None. Local.

    Args:
        launched: whether an MPI launcher started this process.
        proc: where the system shows its processes.
    """
    if not launched:
        streams = proc / "self"
    else:
        found = next((p for p in _ancestors(proc) if _name(p) in _LAUNCHERS), None)
        if found is None or _labels_output(found):
            return None
        streams = found
    try:
        path, errors = (os.readlink(streams / "fd" / number) for number in ("1", "2"))
    except OSError:
        return None
    if not path.startswith(("/dev/pts/", "/dev/tty")) or errors != path:
        return None
    return Terminal(path, *_size(path))


def make_console(
    display: Display,
    terminal: Terminal | None,
    environment: Mapping[str, str],
    stream: TextIO | None = None,
) -> Console:
    """A console on standard output: its own width, colours and alphabet, nothing guessed. Local.

    Width: COLUMNS, else the terminal's, else 120. Colours and cursor movements only with a bar, no
    colours under NO_COLOR; ASCII alone where the locale is not UTF-8.
    """
    stream = stream or sys.stdout
    if not speaks_utf8(environment) and isinstance(stream, io.TextIOWrapper):
        # rich draws with ASCII on a stream that says it is ASCII.
        stream.reconfigure(encoding="ascii", errors="backslashreplace")
    columns = environment.get("COLUMNS", "")
    given = int(columns) if columns.isdigit() and int(columns) > 0 else None
    no_color = display != "bar" or bool(environment.get("NO_COLOR"))
    return Console(
        file=stream,
        width=given or (terminal.width if terminal else _WIDTH),
        height=terminal.height if terminal else _HEIGHT,
        force_terminal=display == "bar",
        force_jupyter=False,
        no_color=no_color,
        color_system="standard" if not no_color else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )


def speaks_utf8(environment: Mapping[str, str]) -> bool:
    """Whether the locale's alphabet is UTF-8. Local.

    Python itself sets LC_CTYPE=C.UTF-8 under a POSIX locale (PEP 538), which says nothing about
    the terminal; that value counts only if LANG agrees.
    """
    overall = environment.get("LC_ALL", "")
    language = environment.get("LANG", "")
    kind = environment.get("LC_CTYPE", "")
    locale = overall or (language if kind == "C.UTF-8" else kind or language)
    return locale.lower().replace("-", "").partition(".")[2].startswith("utf8")


def _ancestors(proc: Path) -> Iterator[Path]:
    at = proc / "self"
    for _ in range(_ANCESTORS):
        try:
            parent = (at / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except (OSError, IndexError):
            return
        if parent in ("0", "1"):
            return
        at = proc / parent
        yield at


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""


def _labels_output(launcher: Path) -> bool:
    try:
        arguments = (launcher / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return True
    # Arguments after the program's name belong to the program.
    own = arguments[: next((i for i, a in enumerate(arguments) if "hpctrain" in a), None)]
    return any(argument in _LABELLING for argument in own)


def _size(path: str) -> tuple[int, int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return _WIDTH, _HEIGHT
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:
        return _WIDTH, _HEIGHT
    finally:
        os.close(descriptor)
    return size.columns or _WIDTH, size.lines or _HEIGHT
