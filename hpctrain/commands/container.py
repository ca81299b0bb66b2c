"""`hpctrain container`: build, inspect and run images; each prints the exact command it runs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hpctrain.launch.site import Site

app = typer.Typer(no_args_is_help=True, help="Build, inspect and run container images.")


class Mpi(str, Enum):
    """MPI families there are images of."""

    openmpi = "openmpi"
    mpich = "mpich"


Program = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="apptainer or singularity. Default: the first of them on PATH."
    ),
]
Bind = Annotated[
    list[str] | None,
    typer.Option(metavar="SRC[:DST[:OPTS]]", help="A folder to show inside; may be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command, do not run it.")]


@app.callback()
def container() -> None:
    """Build, inspect and run container images."""


@app.command()
def build(
    out: Annotated[Path, typer.Argument(metavar="OUT.sif", help="The image to make.")],
    mpi: Annotated[Mpi, typer.Option(help="Family of the launcher it will run under.")] = (
        Mpi.openmpi
    ),
    cuda: Annotated[
        bool, typer.Option("--cuda", help="For NVIDIA GPUs: Horovod with NCCL.")
    ] = False,
    build_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A build argument; see the definition file."),
    ] = None,
    bind: Bind = None,
    source: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Checkout of hpctrain that goes into the image."),
    ] = None,
    program: Program = None,
    dry_run: DryRun = False,
) -> None:
    """Build an image from a checkout of hpctrain, as an ordinary user."""
    import os

    from hpctrain.errors import UsageError
    from hpctrain.launch.container import build_words, cache_settings, find_program
    from hpctrain.launch.recipe import ARGUMENTS_CUDA, DEFINITIONS, checkout

    if out.exists():
        raise UsageError(f"{out} exists: remove it, or give another name.")
    wrong = [argument for argument in build_arg or [] if "=" not in argument]
    if wrong:
        raise UsageError(f"--build-arg {wrong[0]}: write NAME=VALUE (NAME= for an empty value).")
    folder = checkout(source)
    used = find_program(program)
    words = build_words(
        DEFINITIONS[mpi.value],
        str(out.absolute()),
        program=used,
        arguments=build_arg or [],
        argument_file=ARGUMENTS_CUDA if cuda else None,
        binds=bind or [],
        flags=[] if os.geteuid() == 0 else ["--fakeroot"],
    )
    _start(words, cache_settings(used), dry_run, folder)


@app.command()
def run(
    image: Annotated[Path, typer.Argument(metavar="IMAGE.sif")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ARGUMENTS", help="Words of hpctrain: -- train my.toml ..."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Start so many ranks with the host's launcher.")
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(metavar='"mpirun -n 4 ..."', help="The launcher's own words instead."),
    ] = None,
    bind: Bind = None,
    site: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE.toml", help="Site profile: launcher, binds, variables."),
    ] = None,
    program: Program = None,
    dry_run: DryRun = False,
) -> None:
    """Run hpctrain inside an image, the host's launcher outside.

    Folders that the command names are bound. Without --ranks or --launcher one process starts.
    """
    import shlex

    from hpctrain.errors import UsageError
    from hpctrain.launch.container import (
        cache_settings,
        can_share,
        exec_words,
        find_program,
        gpu_flag,
    )
    from hpctrain.launch.hybrid import family_of, folders_of
    from hpctrain.launch.image import check_family

    profile = _profile(site) if site else None
    if ranks and launcher:
        raise UsageError("--ranks or --launcher, not both: put the number into --launcher.")
    start: list[str] = []
    if launcher:
        try:
            start = shlex.split(launcher)
        except ValueError as error:
            raise UsageError(f"--launcher {launcher}: {error}") from None
    elif ranks:
        start = ["mpirun", "-n", str(ranks)]
        if profile:
            start = [profile.launcher, "-n", str(ranks), *profile.launcher_flags]
            if profile.launcher == "srun" and profile.srun_mpi:
                start.insert(1, f"--mpi={profile.srun_mpi}")
    used = find_program(program or (profile.container if profile else None))
    if not image.exists():
        raise UsageError(f"{image}: no such image (hpctrain container build {image} makes one).")
    if start:
        family = profile.mpi if profile else family_of(start[0])
        if family is None:
            _say(
                f"{start[0]} does not say which MPI it is of, so the image's is not compared; "
                "hpctrain itself checks when it starts"
            )
        elif warning := check_family(image, family, used):
            _say(warning)
        if profile and family == "openmpi" and profile.launcher != "srun":
            # Other nodes get what mpirun is told to pass on; srun and Hydra pass on everything.
            start += [word for name in profile.environment for word in ("-x", name)]
    site_binds = profile.binds if profile else []
    words = [
        *start,
        *exec_words(
            str(image.absolute()),
            program=used,
            binds=[*site_binds, *folders_of(arguments or []), *(bind or [])],
            flags=profile.container_flags if profile else [],
            gpu=gpu_flag(),
            sharens=bool(start) and can_share(used),
        ),
        "hpctrain",
        *(arguments or []),
    ]
    settings = cache_settings(used) | (dict(profile.environment) if profile else {})
    _start(words, settings, dry_run)


@app.command()
def inspect(
    image: Annotated[Path, typer.Argument(metavar="IMAGE.sif")],
    json: Annotated[bool, typer.Option("--json", help="All labels, as JSON.")] = False,
    program: Program = None,
) -> None:
    """Say what is in an image: MPI, torch, Horovod, CUDA."""
    import json as json_
    import shlex

    from hpctrain.launch.container import find_program
    from hpctrain.launch.image import describe, inspect_words, labels

    used = find_program(program)
    _say(shlex.join(inspect_words(image, used)))
    found = labels(image, used)
    print(json_.dumps(found, indent=2, sort_keys=True) if json else describe(found))


def _profile(name: str) -> Site:
    from hpctrain.launch.site import load_site

    return load_site(name)


def _say(text: str) -> None:
    typer.echo(f"hpctrain: {text}", err=True)


def _start(
    words: list[str], settings: dict[str, str], dry_run: bool, folder: Path | None = None
) -> None:
    """Print a command as it can be typed, then become it (signals then reach it directly)."""
    import os
    import shlex

    from hpctrain.errors import BackendError

    shown = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    line = " ".join([*shown, shlex.join(words)])
    typer.echo(f"(cd {shlex.quote(str(folder))} && {line})" if folder else line, err=True)
    if dry_run:
        return
    if folder:
        os.chdir(folder)
    try:
        os.execvpe(words[0], words, {**os.environ, **settings})
    except OSError as error:
        raise BackendError(f"{words[0]} cannot be started: {error.strerror}") from None
