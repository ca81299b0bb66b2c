"""One job as its script needs it: what may stand in a directive, and how values are quoted.

Directives (#SBATCH, #PBS) are read by the scheduler and know no quoting that one could rely on, so
their values are checked against short patterns. Everything else reaches the shell quoted.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpctrain.errors import UsageError
from hpctrain.launch.site import VARIABLE
from hpctrain.table import parse_duration_s

Continue = Literal["requeue", "chain", "exit"]
"""After a stop: put the same job back into the queue, submit a new one, or leave it."""

NAME = r"[A-Za-z][A-Za-z0-9._-]{0,63}"
_QUEUE = r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]{0,127}"
_ACCOUNT = r"[A-Za-z0-9_][A-Za-z0-9_.,@+/-]{0,127}"
_SHORTEST_S, _LONGEST_S = 60, 366 * 86400
_LEAD_S = 300
_LONGEST_LEAD_S = 65535
_MOST_SEEDS = 1000
_RESERVED = ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "HPCTRAIN_ATTEMPT")


@dataclass(frozen=True)
class Program:
    """How a job finds hpctrain."""

    words: tuple[str, ...] = ("hpctrain",)
    path: str = ""
    """Folder to put first on PATH; "" where the site's set-up or the container does that."""
    python_path: str = ""
    """Folder to put first on PYTHONPATH; "" for an installed hpctrain."""


@dataclass(frozen=True)
class Job:
    """What to run, on what, and what to do when it ends early. Checked when it is made.

    Raises:
        UsageError: a value that is not allowed; names the option and what is.
    """

    name: str
    out: str
    """Run folder; with several seeds -seed-N is appended."""
    folder: str
    """Of the job's own files: its script, logs and counters."""
    script: str
    """Where the script will be kept."""
    limit_s: int
    """--time."""
    after_stop: Continue
    config: str | None = None
    """None: the built-in run."""
    settings: tuple[str, ...] = ()
    """Each table.key=value, as --set."""
    nodes: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int = 1
    gpus_per_node: int = 0
    queue: str = ""
    account: str = ""
    container: str = ""
    binds: tuple[str, ...] = ()
    """Folders that the run reads and writes, for the container."""
    environment: Mapping[str, str] = field(default_factory=dict)
    directives: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    max_attempts: int = 20
    max_failures: int = 2
    lead_s: int = 0
    """How long before the end SLURM sends SIGUSR1; 0: by the rule, see `lead`."""
    program: Program = Program()
    site: str = ""
    """Name of the profile, for the header."""
    command: tuple[str, ...] = ()
    """Words of the command line that asked for the job, for the header."""

    def __post_init__(self) -> None:
        """Check everything once, so that no renderer has to."""
        _match("--name", self.name, NAME, "a letter, then up to 63 letters, digits, '.', '_', '-'")
        _match("--queue", self.queue, f"({_QUEUE})?", "letters, digits, and any of _ . , @ + -")
        _match(
            "--account", self.account, f"({_ACCOUNT})?", "letters, digits, and any of _ . , @ + / -"
        )
        for option, value, least in (
            ("--nodes", self.nodes, 1),
            ("--ranks-per-node", self.ranks_per_node, 1),
            ("--cpus-per-rank", self.cpus_per_rank, 1),
            ("--gpus-per-node", self.gpus_per_node, 0),
            ("--max-attempts", self.max_attempts, 1),
            ("--max-failures", self.max_failures, 0),
        ):
            if not least <= value < 1_000_000:
                raise UsageError(f"{option} {value}: must be {least} or more")
        if not _SHORTEST_S <= self.limit_s <= _LONGEST_S:
            raise UsageError(f"--time {self.limit_s} s: must be between 1 minute and 366 days")
        if self.lead_s and not 1 <= self.lead_s < min(self.limit_s, _LONGEST_LEAD_S):
            raise UsageError(
                f"--signal-lead {self.lead_s} s: must be shorter than --time ({self.limit_s} s) "
                f"and than {_LONGEST_LEAD_S} s"
            )
        for text in self.directives:
            if not text.startswith("-") or not text.isprintable():
                raise UsageError(
                    f"--directive {text!r}: one line that starts with '-', as in "
                    '--directive="--constraint=a100"'
                )
        for key in self.environment:
            _match("--env", key, VARIABLE, "a name of letters, digits and _, before the first =")
            if key in _RESERVED:
                raise UsageError(f"--env {key}: the scheduler and hpctrain set this one themselves")
        texts = (self.config or "", self.out, self.container, *self.settings)
        if any("\0" in text for text in (*texts, *self.environment.values())):
            raise UsageError("a value holds a NUL byte, which no command can be given")
        if not self.out or self.config == "":
            raise UsageError("an empty path: give a file and a folder")
        if len(set(self.seeds)) < len(self.seeds) or len(self.seeds) > _MOST_SEEDS:
            raise UsageError(f"--seeds: each seed once, and at most {_MOST_SEEDS}")
        own = [text for text in self.settings if text.partition("=")[0].strip() == "seed"]
        if self.seeds and own:
            raise UsageError(f"--seeds and --set {own[0]}: give one of the two")

    @property
    def array(self) -> bool:
        """Whether the scheduler gets an array of jobs, one per seed."""
        return len(self.seeds) > 1

    @property
    def lead(self) -> int:
        """Seconds before the end at which SLURM sends SIGUSR1: 5 minutes, at most a sixth.

        SLURM may send it up to 60 s earlier (its manual; seen).
        """
        return self.lead_s or min(_LEAD_S, self.limit_s // 6)


def quoted(text: str) -> str:
    """One word of bash that stands for exactly this text, on one line. Local, pure."""
    if text.isprintable():
        return shlex.quote(text)
    parts = []
    for byte in text.encode("utf-8", "surrogateescape"):
        plain = 0x20 <= byte < 0x7F and byte not in b"\\'"
        parts.append(chr(byte) if plain else f"\\x{byte:02x}")
    return "$'" + "".join(parts) + "'"


def path_word(text: str) -> str:
    """A path that no program takes for a flag or, like mpirun ":", for a separator. Local, pure."""
    return f"./{text}" if text[:1] in ("-", ":") else text


def clock(seconds: int, *, days: bool) -> str:
    """HH:MM:SS, or D-HH:MM:SS from one day on if `days`. Local, pure."""
    whole, rest = divmod(seconds, 86400) if days else (0, seconds)
    hours, rest = divmod(rest, 3600)
    text = f"{hours:02}:{rest // 60:02}:{rest % 60:02}"
    return f"{whole}-{text}" if whole else text


def parse_time(option: str, text: str) -> int:
    """Whole seconds of a duration option. Local.

    Raises:
        UsageError: it is none.
    """
    try:
        return int(float(str(parse_duration_s(text))))
    except ValueError as error:
        raise UsageError(f"{option} {text}: {error}") from None


def parse_seeds(text: str) -> tuple[int, ...]:
    """`1,2,5-7` as numbers. Local.

    Raises:
        UsageError: it is no such list.
    """
    seeds: list[int] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < 2**32 or last - first >= _MOST_SEEDS:
            raise UsageError(
                f"--seeds {text}: numbers and ranges below 2**32, as in 1,2,3 or 0-4, at most "
                f"{_MOST_SEEDS}"
            )
        seeds += range(first, last + 1)
    return tuple(seeds)


def parse_environment(texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE texts as a dictionary. Local.

    Raises:
        UsageError: a text without "=".
    """
    pairs = [text.partition("=") for text in texts]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise UsageError(f"--env {wrong[0]}: write NAME=VALUE")
    return {name: value for name, _, value in pairs}


def this_program() -> Program:
    """The hpctrain of this very Python: its console script, else its source folder. Local."""
    folder = str(Path(sys.executable).parent)
    if shutil.which("hpctrain", path=folder):
        return Program(path=folder)
    source = str(Path(__file__).resolve().parents[2])
    return Program((Path(sys.executable).name, "-m", "hpctrain"), folder, source)


def _match(option: str, text: str, pattern: str, allowed: str) -> None:
    if not re.fullmatch(pattern, text):
        raise UsageError(f"{option} {text!r}: {allowed}")
