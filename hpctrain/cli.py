"""The command line. Sub-commands import what they need, so `--help` loads neither torch nor MPI.

Under a launcher every rank runs this file. Rank 0 alone speaks: the others see the same arguments
and, as a rule, the same configuration file, so their complaints would only repeat it.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from hpctrain import __version__
from hpctrain.commands.calibrate import calibrate
from hpctrain.commands.container import app as container
from hpctrain.commands.diversity import diversity
from hpctrain.commands.doctor import doctor, topology
from hpctrain.commands.submit import submit
from hpctrain.errors import EXIT_COMPLETE, EXIT_USAGE, HpctrainError
from hpctrain.transport.launcher import launch_from_environment

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

EPILOG = """Examples:

\b
  mpirun -n 2 hpctrain                                  the built-in run: handwritten digits
  mpirun -n 4 hpctrain train my.toml --out runs/a       a configuration of your own
  mpirun -n 4 hpctrain train my.toml --out runs/a --resume auto
  hpctrain check my.toml --set lr.base=0.3              validate without MPI
  hpctrain config > my.toml                             start from the built-in one
  mpirun -n 4 hpctrain doctor                           what would go wrong here, and the fix
  mpirun -n 4 hpctrain diversity --checkpoint runs/a    how large a batch these gradients bear
  hpctrain submit my.toml --scheduler slurm --nodes 4 --time 4h

Exit codes: 0 complete, 2 usage, 65 data, 69 backend unavailable, 70 internal, 73 cannot write,
75 stopped early with a good checkpoint (run again with --resume auto), 78 configuration,
128+n signal.
"""

Config = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.toml", help="Default: the built-in digits run."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="table.key=value", help="Override one value; may be repeated."),
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, e.g. runs/digits-001.")
]


@app.callback(invoke_without_command=True, epilog=EPILOG)
def hpctrain(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Train PyTorch models on many ranks, started by mpirun, srun or mpiexec.

    Without a command it trains: `hpctrain my.toml` is `hpctrain train my.toml`.
    """
    if version:
        print(f"hpctrain {__version__}")
        raise typer.Exit


@app.command()
def train(
    config: Config = None,
    set_: Set = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder. Default: the next free runs/NAME-001, -002, ..."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|DIR|never",
            help="auto: continue the newest unfinished run (or --out), else start; DIR: continue "
            "that run; never: start afresh.",
        ),
    ] = "never",
    walltime: Annotated[
        str | None,
        typer.Option(
            metavar="30m", help="Save and exit 75 before this much time has passed: 90, 30m, 4h."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, take one batch, write no file.")
    ] = False,
) -> None:
    """Train. Start it under a launcher: mpirun -n 4 hpctrain train CONFIG.toml.

    A run that is continued without CONFIG.toml takes the configuration it was started with.
    """
    from hpctrain.api import launch, parse_options
    from hpctrain.config import load

    options = parse_options(out=out, resume=resume, walltime=walltime, dry_run=dry_run)
    loaded = load(config or _config_of_the_run(out, resume), set_ or [])
    _speak()
    raise typer.Exit(launch(loaded, options))


@app.command()
def check(config: Config = None, set_: Set = None) -> None:
    """Validate a configuration without MPI, data or GPU."""
    from hpctrain.config import load

    loaded = load(config, set_ or [])
    print(
        f"{loaded.source}: good ({loaded.run.name}: {loaded.run.data.kind}, "
        f"{loaded.run.model.kind}, {loaded.run.exchange.kind})"
    )


@app.command(name="config")
def config_(
    config: Config = None,
    set_: Set = None,
    origin: Annotated[
        bool, typer.Option("--origin", help="One line per value with the layer that set it.")
    ] = False,
) -> None:
    """Print the resolved configuration as TOML."""
    from hpctrain.config import load
    from hpctrain.toml_text import to_toml

    loaded = load(config, set_ or [])
    if not origin:
        print(to_toml(loaded.run), end="")
        return
    rows = list(loaded.rows())
    width = max(len(f"{key} = {value}") for key, value, _ in rows)
    for key, value, where in rows:
        print(f"{f'{key} = {value}':<{width}}  # {where}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration file, for editor completion."""
    import json

    from hpctrain.config import file_schema

    print(json.dumps(file_schema(), indent=2))


@app.command()
def status(run: RunArgument) -> None:
    """Say where a run stands."""
    from hpctrain.runs import report

    print(report.status(run))


@app.command()
def stop(run: RunArgument) -> None:
    """Ask a run to save and exit with 75, from any machine that sees its folder."""
    from hpctrain.runs import report

    print(report.stop(run))


@app.command()
def logs(
    run: RunArgument,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    lines: Annotated[int, typer.Option(min=1, help="How many of the last lines.")] = 40,
) -> None:
    """Print the end of one rank's log."""
    from hpctrain.runs import report

    print(report.logs(run, rank, lines))


app.command()(submit)
app.command()(calibrate)
app.command()(diversity)
app.command()(doctor)
app.command()(topology)
app.add_typer(container, name="container")


def run_command_line(arguments: list[str]) -> int:
    """Run one command; the exit code. Local up to the moment training starts."""
    rank = launch_from_environment().rank
    if rank > 0:
        _hush()
    first = arguments[0] if arguments else ""
    if first not in ("-h", "--help", "--version") and (
        not first or first.startswith("-") or first.endswith(".toml")
    ):
        arguments = ["train", *arguments]
    try:
        result = app(arguments, prog_name="hpctrain", standalone_mode=False)
    except HpctrainError as error:
        _complain(rank, str(error))
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_COMPLETE
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _complain(rank, f"{error.format_message()} (see hpctrain --help)")
        return EXIT_USAGE
    return result if isinstance(result, int) else EXIT_COMPLETE


def _config_of_the_run(out: Path | None, resume: str) -> Path | None:
    """The configuration a run was started with, where one is continued and no other is given."""
    if resume == "never":
        return None
    folder = out if resume == "auto" else Path(resume)
    path = folder / "config.toml" if folder else None
    return path if path and path.is_file() else None


def _complain(rank: int, message: str) -> None:
    """Say why this process leaves before training; rank 0 at once, the others if need be.

    Any other rank waits for its launcher to end it and speaks when that does not happen: then rank
    0 may have had nothing to complain about. The wait also lets rank 0 be heard, as mpirun ends
    all ranks as soon as one leaves with an error.
    """
    if rank > 0:
        time.sleep(_RANK_0_SPEAKS_WITHIN_S)
        message = f"[rank {rank} {socket.gethostname()}] {message}"
    print(f"hpctrain: {message}", file=_voices[1])


_RANK_0_SPEAKS_WITHIN_S = 10.0
_voices = (sys.stdout, sys.stderr)


def _hush() -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process


def _speak() -> None:
    sys.stdout, sys.stderr = _voices
