"""`hpctrain doctor` and `hpctrain topology`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpctrain.commands.output import let_errors_speak, make_console

Json = Annotated[bool, typer.Option("--json", help="Print JSON (docs/doctor.md) instead.")]


def doctor(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where run folders will go.")] = Path(
        "runs"
    ),
    json_: Json = False,
    mpi: Annotated[
        bool, typer.Option("--mpi", help="Start MPI although no known launcher is seen.")
    ] = False,
    limit: Annotated[
        str, typer.Option(metavar="2m", help="Give up after so long, with code 69.")
    ] = "2m",
) -> None:
    """Examine what a run would meet here: mpirun -n 4 hpctrain doctor, or alone on a login node.

    One line per finding and its remedy. Exit code 0, or 69 if a run would fail.
    """
    from hpctrain.doctor.report import Report
    from hpctrain.doctor.run import run
    from hpctrain.errors import UsageError
    from hpctrain.table import parse_duration_s

    try:
        limit_s = float(str(parse_duration_s(limit)))
    except ValueError as error:
        raise UsageError(f"--limit {limit}: {error}") from None

    def show(report: Report) -> int:
        if json_:
            print(report.to_json(), flush=True)
        else:
            report.show(make_console())
        return report.exit_code

    let_errors_speak()
    raise typer.Exit(run(out, show, with_launcher=mpi or None, limit_s=limit_s))


def topology(
    groups: Annotated[
        str,
        typer.Option(metavar="node|numa|switch|world|size:N|nodes:N", help="What makes a group."),
    ] = "node",
    full: Annotated[bool, typer.Option("--full", help="Draw every node.")] = False,
    json_: Json = False,
) -> None:
    """Draw switches, nodes, NUMA domains, ranks and groups: mpirun -n 4 hpctrain topology."""
    from hpctrain.doctor.levels import draw, remarks
    from hpctrain.doctor.survey import Survey, run
    from hpctrain.errors import EXIT_COMPLETE

    def show(found: Survey) -> int:
        if json_:
            print(found.to_json(), flush=True)
            return EXIT_COMPLETE
        console = make_console()
        console.print(draw(found.levels, found.groups, full=full))
        for remark in remarks(found.levels.topology, found.levels.switches):
            console.print(remark)
        return EXIT_COMPLETE

    let_errors_speak()
    raise typer.Exit(run(groups, show))
