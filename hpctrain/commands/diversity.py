"""`hpctrain diversity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpctrain.commands.output import let_errors_speak, make_console


def diversity(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.toml", help="Default: that of the run, else the built-in digits run."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN|STEP",
            help="A run folder (its newest checkpoint) or a checkpoint. Default: the initial "
            "parameters.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="table.key=value", help="As for train; may be repeated."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Take so many at random. Default: all.")
    ] = None,
    erank: Annotated[
        int,
        typer.Option(
            "--erank", metavar="N", min=0, help="Effective rank of so many gradients; 0: leave out."
        ),
    ] = 256,
    layers: Annotated[bool, typer.Option("--layers", help="A line for each parameter.")] = False,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every number there too.")
    ] = None,
) -> None:
    """Measure gradient diversity on the training set: mpirun -n 4 hpctrain diversity CONFIG.toml.

    Every sample's own gradient is taken, so it costs several passes over the set; the ranks share
    the work. Nothing is trained.
    """
    from hpctrain.api import on_all_ranks
    from hpctrain.appraisal import appraise
    from hpctrain.assemble import World
    from hpctrain.commands.diversity_table import show
    from hpctrain.config import load
    from hpctrain.errors import EXIT_COMPLETE, UsageError, WriteError
    from hpctrain.place import run_of
    from hpctrain.runs.durable import reason, write_durably

    if json_ is not None and not json_.parent.is_dir():
        raise UsageError(f"--json {json_}: there is no folder {json_.parent}; make it first")
    run = None if checkpoint is None else run_of(checkpoint)
    loaded = load(config or (run and run / "config.toml"), set_ or [])

    def body(world: World) -> None:
        found = appraise(loaded, world, checkpoint=checkpoint, samples=samples, rank_samples=erank)
        if world.comm.rank > 0:
            return
        show(found, make_console(), layers=layers)
        if json_ is not None:
            try:
                write_durably(json_, f"{found.to_json()}\n".encode())
            except OSError as error:
                raise WriteError(f"--json {json_}: {reason(error)}") from None

    let_errors_speak()
    on_all_ranks(body)
    raise typer.Exit(EXIT_COMPLETE)
