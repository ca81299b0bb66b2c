"""`hpctrain calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hpctrain.commands.output import let_errors_speak


def calibrate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|STEP", help="A run folder (its newest checkpoint) or a checkpoint in one."
        ),
    ],
    most: Annotated[
        int, typer.Option(metavar="16", help="Batches up to so many times the run's own.")
    ] = 16,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Samples of each branch. Default: half an epoch, at least 8 of the largest steps."
        ),
    ] = None,
    lr: Annotated[
        Literal["linear", "sqrt", "adascale", "none"] | None,
        typer.Option(
            help="How the step size follows the batch. Default: linear for sgd, sqrt for adamw."
        ),
    ] = None,
    tolerance: Annotated[
        str, typer.Option(metavar="0.01|1%", help="How much higher a larger batch's loss may be.")
    ] = "0.01",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="table.key=value", help="Override one value of the run's."),
    ] = None,
) -> None:
    """Find the critical batch of a run: mpirun -n 4 hpctrain calibrate runs/a.

    From a checkpoint, train over the same samples with batches of 1, 2, 4, ... times the run's; the
    largest whose loss keeps up is the critical batch. Writes calibration.json into the run folder
    and changes nothing else there.
    """
    from hpctrain.api import on_all_ranks
    from hpctrain.assemble import World
    from hpctrain.calibrate import calibrate as find_critical_batch
    from hpctrain.config import load
    from hpctrain.errors import EXIT_COMPLETE, EXIT_STOPPED, UsageError
    from hpctrain.place import run_of
    from hpctrain.runs.calibration import Tolerance, Wanted

    run = run_of(checkpoint)
    if run is None:
        raise UsageError(
            f"{checkpoint}: no run folder; give one that holds config.toml and checkpoints/, or "
            "one of its checkpoints"
        )
    loaded = load(run / "config.toml", set_ or [])
    wanted = Wanted(most, samples, lr, Tolerance.parse(tolerance))

    def body(world: World) -> bool:
        def say(line: str) -> None:
            print(line, flush=True)

        return find_critical_batch(world, loaded, checkpoint, wanted, say) is not None

    let_errors_speak()
    raise typer.Exit(EXIT_COMPLETE if on_all_ranks(body) else EXIT_STOPPED)
