"""`hpctrain submit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hpctrain.launch.job import Continue, Job
    from hpctrain.launch.site import Site

Number = Annotated[int, typer.Option(min=1)]
Texts = list[str] | None


def submit(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.toml", help="Default: the built-in digits run."),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="slurm|pbs", help="Default: that of --site.")
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE.toml", help="Site profile. Default: generic-SCHEDULER."),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(metavar="srun|mpirun|mpiexec", help="Instead of the site's launcher."),
    ] = None,
    set_: Annotated[
        Texts,
        typer.Option("--set", metavar="table.key=value", help="As for train; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME.")] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Of the job. Default: the last part of --out, else the configuration's."),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(metavar="1,2,5-7", help="One run per seed, in OUT-seed-N, as a job array."),
    ] = "",
    nodes: Number = 1,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Default: --gpus-per-node, at least 1.")
    ] = None,
    cpus_per_rank: Number = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0)] = 0,
    time_: Annotated[
        str, typer.Option("--time", metavar="4h", help="Time limit: 90, 30m, 4h, 2d, HH:MM:SS.")
    ] = "1h",
    queue: Annotated[str, typer.Option("--queue", "--partition", help="Queue.")] = "",
    account: Annotated[str, typer.Option(help="Whom the time is charged to.")] = "",
    container: Annotated[
        str, typer.Option(metavar="IMAGE.sif", help="Run hpctrain inside this image.")
    ] = "",
    env: Annotated[
        Texts,
        typer.Option(metavar="NAME=VALUE", help="Variable for all ranks; may be repeated."),
    ] = None,
    directive: Annotated[
        Texts,
        typer.Option(
            metavar="TEXT", help="More for the scheduler, as it is: --directive=--constraint=a100."
        ),
    ] = None,
    after_stop: Annotated[
        str | None,
        typer.Option(
            metavar="requeue|chain|exit",
            help="After exit 75: the same job again, a new one, or none. "
            "Default: requeue (SLURM), chain (PBS).",
        ),
    ] = None,
    max_attempts: Annotated[int, typer.Option(min=1, help="Starts of a run in all.")] = 20,
    max_failures: Annotated[
        int, typer.Option(min=0, help="Starts again after a killed rank or node, in a row.")
    ] = 2,
    signal_lead: Annotated[
        str,
        typer.Option(
            metavar="5m",
            help="SLURM: when before the end to ask for a stop. Default: 5m, at most a sixth of "
            "--time.",
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script, write and submit nothing.")
    ] = False,
) -> None:
    """Write a job script for SLURM or PBS, keep it in runs/NAME.job, and submit it.

    The job saves and stops before its time limit and continues by itself until the run is complete.
    """
    from hpctrain.config import load
    from hpctrain.launch import submit as launch
    from hpctrain.launch.job import (
        Job,
        Program,
        parse_environment,
        parse_seeds,
        parse_time,
        this_program,
    )

    loaded = load(config, set_ or [])
    site_name, profile = _choose_site(site, scheduler, launcher)
    job_name = name or _name_of(out) or loaded.run.name
    brings_own = bool(container or profile.setup)

    def job_kept_at(script: str) -> Job:
        return Job(
            name=job_name,
            out=str(out) if out else f"runs/{job_name}",
            folder=f"runs/{job_name}.job",
            script=script,
            limit_s=parse_time("--time", time_),
            after_stop=_choose_ending(after_stop, profile),
            config=None if config is None else str(config),
            settings=tuple(set_ or ()),
            nodes=nodes,
            ranks_per_node=ranks_per_node or max(gpus_per_node, 1),
            cpus_per_rank=cpus_per_rank,
            gpus_per_node=gpus_per_node,
            queue=queue,
            account=account,
            container=container,
            binds=_binds(config, set_ or [], out, parse_environment(env or ()))
            if container
            else (),
            environment=parse_environment(env or ()),
            directives=tuple(directive or ()),
            seeds=parse_seeds(seeds),
            max_attempts=max_attempts,
            max_failures=max_failures,
            lead_s=parse_time("--signal-lead", signal_lead) if signal_lead else 0,
            program=Program() if brings_own else this_program(),
            site=site_name,
            command=("hpctrain", *(word for word in sys.argv[1:] if word != "--dry-run")),
        )

    job = job_kept_at(launch.script_path(f"runs/{job_name}.job", 1))
    if container and (remark := launch.check_image(job, profile)):
        _remark(remark)
    if dry_run:
        text = launch.render(job, profile)
        print(text, end="", flush=True)
        if said := launch.verdict(profile, text):
            _remark(said)
        return
    script = launch.keep(job.folder, lambda path: launch.render(job_kept_at(path), profile))
    print(f"script      {script}")
    job_id = launch.hand_over(profile, script)
    folder = job.out + ("-seed-N" if job.seeds else "")
    print(f"job         {job_id} ({profile.scheduler}), its log in {job.folder}/")
    print(f"run folder  {folder}: hpctrain status, hpctrain stop, hpctrain logs")


def _choose_site(name: str | None, scheduler: str | None, launcher: str | None) -> tuple[str, Site]:
    from pydantic import ValidationError

    from hpctrain.errors import UsageError
    from hpctrain.launch.site import Site, known_sites, load_site

    if scheduler not in (None, "slurm", "pbs"):
        raise UsageError(f"--scheduler {scheduler}: slurm or pbs")
    if name is None and scheduler is None:
        raise UsageError(
            "give --scheduler slurm or pbs, or a site profile: --site "
            + ", ".join(sorted(known_sites()))
        )
    name = name or f"generic-{scheduler}"
    site = load_site(name)
    if scheduler not in (None, site.scheduler):
        raise UsageError(f"--scheduler {scheduler}: --site {name} is one of {site.scheduler}")
    if launcher is None:
        return name, site
    try:
        return name, Site.model_validate({**site.model_dump(), "launcher": launcher})
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"--launcher {launcher} at --site {name}: {why}") from None


def _choose_ending(given: str | None, site: Site) -> Continue:
    from hpctrain.errors import UsageError

    allowed: dict[str, Continue] = {"requeue": "requeue", "chain": "chain", "exit": "exit"}
    if site.scheduler == "pbs":
        del allowed["requeue"]
    given = given or next(iter(allowed))
    if given not in allowed:
        raise UsageError(f"--after-stop {given}: {site.scheduler} knows {', '.join(allowed)}")
    return allowed[given]


def _binds(
    config: Path | None, settings: list[str], out: Path | None, variables: dict[str, str]
) -> tuple[str, ...]:
    """Folders of the run that a container does not show by itself, as seen from here."""
    import os

    from hpctrain.launch.hybrid import folders_of

    words = ["train", *([str(config)] if config else []), *(f"--set={text}" for text in settings)]
    words += [f"--out={out}"] if out else []
    # The temporary folder of a login node is not that of the job.
    environment = {**os.environ, **variables, "TMPDIR": ""}
    return tuple(folders_of(words, environment))


def _name_of(out: Path | None) -> str | None:
    """The last part of --out, where it can name a job."""
    import re

    from hpctrain.launch.job import NAME

    return out.name if out and re.fullmatch(NAME, out.name) else None


def _remark(text: str) -> None:
    print(f"hpctrain: {text}", file=sys.stderr)
