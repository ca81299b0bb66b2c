"""`hpctrain calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hpctrain.commands.doctor import let_errors_speak
from hpctrain.errors import UsageError


def calibrate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with a checkpoint.")],
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
    step: Annotated[
        int | None,
        typer.Option(help="Start from the checkpoint of this step. Default: the newest."),
    ] = None,
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
    from hpctrain.api import launch_calibration
    from hpctrain.config import load
    from hpctrain.runs.calibration import Tolerance, Wanted

    if not (run / "config.toml").is_file():
        raise UsageError(f"{run}: no run folder; give the one that holds config.toml")
    wanted = Wanted(most, samples, lr, Tolerance.parse(tolerance), step)
    loaded = load(run / "config.toml", set_ or [])
    let_errors_speak()
    raise typer.Exit(launch_calibration(loaded, run, wanted))
