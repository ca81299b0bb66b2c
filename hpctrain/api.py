"""Starting a run: from the command line (`launch`) and from Python (`hpctrain.train`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import hpctrain
from hpctrain.assemble import Options, World, open_session
from hpctrain.config import Loaded, from_mapping, load
from hpctrain.errors import EXIT_COMPLETE, EXIT_STOPPED, ConfigError, UsageError
from hpctrain.session import Session
from hpctrain.table import parse_duration_s
from hpctrain.train import rehearse, run_training
from hpctrain.transport import mpi

Made = TypeVar("Made")


@dataclass(frozen=True)
class Outcome:
    """How a run ended, equal on all ranks."""

    complete: bool
    stopped_because: str | None
    """None when complete."""
    folder: Path | None
    """The run folder; None after a dry run."""
    step: int
    samples: int
    results: dict[str, float]
    """Of the last evaluation: loss, and accuracy where the task has one."""


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | Loaded | None = None,
    *,
    set: Sequence[str] = (),  # noqa: A002 - the command line's word
    out: str | os.PathLike[str] | None = None,
    resume: str = "never",
    walltime: str | float | None = None,
) -> Outcome:
    """Train as `hpctrain train` does. Collective: call it on every rank that the launcher started.

    Args:
        config: A TOML file, a dictionary of tables, or None for the embedded digits run.
        set: `table.key=value` texts, as --set.
        out: The run folder, as --out.
        resume: "auto", "never" or a run folder, as --resume.
        walltime: Seconds or "30m", as --walltime.

    Raises:
        HpctrainError: as the command line's messages; `error.exit_code` is its exit code.
    """
    if isinstance(config, Loaded):
        loaded = config
    elif isinstance(config, Mapping):
        if set:
            raise ConfigError("give `set` beside a file; a dictionary can hold the values itself")
        loaded = from_mapping(dict(config))
    else:
        loaded = load(config, set)
    options = parse_options(
        out=None if out is None else Path(out), resume=resume, walltime=walltime
    )
    return run_on(_mpi_world(), loaded, options)


def parse_options(
    *, out: Path | None, resume: str, walltime: str | float | None, dry_run: bool = False
) -> Options:
    """Check and convert command-line texts. Local.

    Raises:
        UsageError: a duration that is none, or a --resume that is neither a word nor a folder.
    """
    try:
        walltime_s = None if walltime is None else float(str(parse_duration_s(walltime)))
    except ValueError as error:
        raise UsageError(f"--walltime {walltime}: {error}") from None
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UsageError(f"--resume {resume}: neither auto, never nor a run folder")
    return Options(out, resume, walltime_s, dry_run)


def launch(loaded: Loaded, options: Options) -> int:
    """Collective. Start MPI, run, and translate the outcome into the process's exit code.

    Args:
        loaded: The configuration.
        options: Folder, resume, walltime.
    """
    outcome = on_all_ranks(lambda world: run_on(world, loaded, options))
    return EXIT_COMPLETE if outcome.complete or options.dry_run else EXIT_STOPPED


def on_all_ranks(body: Callable[[World], Made]) -> Made:
    """Collective. Start MPI and call `body`; what escapes from it on one rank ends all ranks."""
    world = _mpi_world()
    with mpi.guard().guarded():
        return body(world)


def run_on(world: World, loaded: Loaded, options: Options) -> Outcome:
    """Collective. One whole run over the ranks of `world`, whatever carries it."""
    with open_session(loaded, world, options) as session:
        if options.dry_run:
            reason: str | None = "dry run"
            session.journal.say(rehearse(session))
        else:
            reason = run_training(session)
            if reason is not None:
                step = session.clock.step
                text = f"stopped after step {step} by {reason}; its checkpoint is good"
                session.journal.note(session.clock, text)
            session.summarise(_following(loaded, session, reason))
            session.journal.end(session.clock, reason, EXIT_STOPPED if reason else EXIT_COMPLETE)
    return Outcome(
        complete=reason is None,
        stopped_because=reason,
        folder=session.journal.folder,
        step=session.clock.step,
        samples=session.clock.samples,
        results=session.results,
    )


def _mpi_world() -> World:
    return World(mpi.start(), mpi.facts, lambda code: mpi.guard().abort(code))


def _following(loaded: Loaded, session: Session, reason: str | None) -> list[str]:
    """What a person may want to do next."""
    folder = session.journal.folder
    if reason is not None:
        return [f"the same command with --out {folder} --resume auto"]
    if loaded.source.startswith("embedded"):
        return [
            "hpctrain config > my.toml             # this run's configuration, to change",
            "mpirun -n 4 hpctrain train my.toml    # the same losses on four ranks",
            f"hpctrain status {folder}",
        ]
    return [f"hpctrain status {folder}"]


hpctrain.train = train  # the sub-module of that name must not hide it
