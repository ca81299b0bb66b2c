"""A run whose launcher stays on the host: which MPI family it is of, which folders ranks need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpctrain.errors import BackendError
from hpctrain.launch.image import Family

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SIGNS: tuple[tuple[str, Family], ...] = (
    ("open mpi", "openmpi"),
    ("openrte", "openmpi"),
    ("prrte", "openmpi"),
    ("hydra", "mpich"),
    ("mpich", "mpich"),
    ("intel(r) mpi", "mpich"),
    ("mvapich", "mpich"),
    ("pals", "mpich"),
)
"""What `LAUNCHER --version` says, in lower case."""

ALWAYS_BOUND = ("/tmp", "/var/tmp")
"""Besides $HOME, what Apptainer shows inside by default."""


def family_of(launcher: str) -> Family | None:
    """MPI family of a launcher, from its own words; None where it does not tell (srun). Local.

    Raises:
        BackendError: it cannot be started.
    """
    if Path(launcher).name == "srun":
        return None
    try:
        done = subprocess.run(
            [launcher, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise BackendError(
            f"the launcher {launcher} cannot be started ({error.strerror}): load the site's MPI "
            'module, or name another one (--launcher "mpiexec -n 4").'
        ) from None
    said = (done.stdout + done.stderr).lower()
    return next((family for sign, family in SIGNS if sign in said), None)


def folders_of(
    arguments: Sequence[str], environ: Mapping[str, str] | None = None, cwd: Path | None = None
) -> list[str]:
    """Folders that a run reads or writes, as far as they must be bound by hand. Local.

    The working folder, the configuration's, the run folder's, data.root, paths in [data] and
    $HPCTRAIN_DATA, $TMPDIR; less what lies in $HOME, /tmp or another of them. A symbolic link is
    bound by the name it was given and by where it points.

    Args:
        arguments: Words of the command `hpctrain ...`.
        environ: The environment, by default this process's.
        cwd: The working folder, by default this process's.
    """
    env = os.environ if environ is None else environ
    here = cwd or Path.cwd()
    names = [str(here), env.get("HPCTRAIN_DATA", ""), env.get("TMPDIR", "")]
    names += _named_by(arguments, here)
    folders = []
    for name in filter(None, names):
        path = here / Path(name).expanduser()
        while not path.is_dir() and path != path.parent:
            path = path.parent
        folders += [Path(os.path.normpath(path)), path.resolve()]
    bound = [Path(name) for name in (env.get("HOME", ""), *ALWAYS_BOUND) if name]
    kept: list[Path] = []
    for folder in sorted(set(folders)):
        root = folder == Path(folder.anchor)
        if not root and not any(folder.is_relative_to(other) for other in (*bound, *kept)):
            kept.append(folder)
    return [str(folder) for folder in kept]


def _named_by(arguments: Sequence[str], here: Path) -> Iterator[str]:
    """Paths in the command's words and in the configuration file they name."""
    words = list(arguments)
    for number, word in enumerate(words):
        option, _, value = word.partition("=")
        if not value and number + 1 < len(words):
            value = words[number + 1]
        if option in ("--out", "--resume") and value not in ("auto", "never"):
            yield value
        elif option == "--set" and value.startswith("data."):
            yield from _absolute(value.partition("=")[2].strip("\"'"))
        elif word.endswith(".toml"):
            yield word
            yield from _data_paths(here / word)


def _data_paths(config: Path) -> Iterator[str]:
    """Absolute paths in the [data] table; a broken file is the run's own business."""
    try:
        with config.open("rb") as source:
            table: Any = tomllib.load(source).get("data", {})
    except (OSError, tomllib.TOMLDecodeError):
        return
    for value in table.values() if isinstance(table, dict) else ():
        yield from _absolute(value)


def _absolute(value: object) -> Iterator[str]:
    if isinstance(value, str) and (value.startswith(("/", "~"))):
        yield value
