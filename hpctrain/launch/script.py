"""The parts that the scripts of both schedulers share. Text only; nothing is started or written.

A script reads from top to bottom: where it comes from, directives, numbers a person may change,
set-up, the launch, and what follows from its exit code. There is no `set -e`: every code matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpctrain.errors import (
    EXIT_BACKEND,
    EXIT_CANNOT_WRITE,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_INTERNAL,
    EXIT_STOPPED,
    EXIT_USAGE,
)
from hpctrain.launch.container import exec_words
from hpctrain.launch.job import Job, path_word, quoted
from hpctrain.launch.site import Site

_FINAL = (EXIT_USAGE, EXIT_DATA, EXIT_BACKEND, EXIT_INTERNAL, EXIT_CANNOT_WRITE, EXIT_CONFIG)
_NO_COMMAND = (126, 127)
_CACHES = {
    "XDG_CACHE_HOME": "",
    "MIOPEN_USER_DB_PATH": "/miopen",
    "MPLCONFIGDIR": "/matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "/inductor",
    "TRITON_CACHE_DIR": "/triton",
}
"""Variable -> folder below the cache; $HOME is often small, slow, or without file locks."""


@dataclass(frozen=True)
class Parts:
    """What one scheduler puts into the common script; every entry is a line."""

    submit: str
    """Words that submit a script."""
    directives: Sequence[str]
    index: str
    """Variable that holds a task's number in an array."""
    numbers: Sequence[str]
    """More variables that a person may change."""
    start: Sequence[str]
    """Traps, which set `told` when the job is to end, and whatever must come before the set-up."""
    begin: Sequence[str]
    """Sets `job` and `attempt`."""
    threads: str
    """Shell word: threads of a rank."""
    launch: Sequence[str]
    """Sets the array `launch`."""
    walltime: Sequence[str]
    """Adds the deadline to the array `train`."""
    unless_asked: str
    """Condition of bash, with && in front: it was not this script that wrote the STOP file."""
    requeue: Sequence[str]
    """Puts the same job back into the queue."""
    chain: Sequence[str]
    """Submits a job that continues this run."""


def assemble(job: Job, site: Site, parts: Parts) -> str:
    """The whole script. Local, pure."""
    blocks: list[Iterable[str]] = [
        ["#!/bin/bash", *_header(job, site, parts), *parts.directives],
        _numbers(job, parts),
        ["told=  # not empty: somebody ended the job", "launcher=", *parts.start],
        _setup(job, site),
        _environment(job, parts),
        _launch(job, site, parts),
        _wait(),
        _after(job, parts),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def flags(job: Job, site: Site, default: str) -> list[str]:
    """Lines that add the flags which place the ranks, and the site's own. Local, pure.

    Args:
        job: For the numbers in the site's flags.
        site: Its `placement` takes the place of `default`.
        default: Flags as bash.
    """
    placing = default if site.placement is None else words(site.placement)
    for name, value in (
        ("{nodes}", job.nodes),
        ("{ranks}", job.nodes * job.ranks_per_node),
        ("{ranks_per_node}", job.ranks_per_node),
        ("{cpus_per_rank}", job.cpus_per_rank),
    ):
        placing = placing.replace(name, str(value))
    return [f"launch+=({some})" for some in (placing, words(site.launcher_flags)) if some]


def words(texts: Iterable[str]) -> str:
    """Words of bash, quoted. Local, pure."""
    return " ".join(quoted(text) for text in texts)


def forward_by_open_mpi(job: Job, site: Site) -> list[str]:
    """Lines that make Open MPI's mpirun pass the environment on to other nodes. Local, pure."""
    own = [*_exported(job, site), *_CACHES, "OMP_NUM_THREADS", "PYTHONUNBUFFERED"]
    names = ["PATH", "LD_LIBRARY_PATH", "PYTHONPATH", *dict.fromkeys(own)]
    return [
        f'for name in {words(names)} "${{!HPCTRAIN_@}}"; do',
        '    [ -z "${!name+set}" ] || launch+=(-x "$name")',
        "done",
    ]


def _header(job: Job, site: Site, parts: Parts) -> list[str]:
    what = quoted(job.config) if job.config is not None else "the built-in run"
    seeds = f", one task for each of {len(job.seeds)} seeds" if job.array else ""
    profile = f" ({site.title})" if site.title else ""
    lines = [
        f"Trains {what} on {job.nodes} x {job.ranks_per_node} ranks{seeds}. Written by",
        f"    {words(job.command)}",
        f"for the site {quoted(job.site)}{profile}.",
        "It is yours to keep and to change. Submit it in the folder where it was written:",
        f"    {parts.submit} {quoted(job.script)}",
    ]
    folder = quoted(job.out + (f"-seed-{job.seeds[0]}" if job.seeds else ""))
    lines.append(f"See how it stands: hpctrain status {folder}")
    lines.append(f"Save and end it for good: hpctrain stop {folder}")
    return [f"# {line}" for line in lines]


def _numbers(job: Job, parts: Parts) -> list[str]:
    lines = [
        f"limit_s={job.limit_s}  # the time limit above, in seconds",
        f"ranks_per_node={job.ranks_per_node}",
        *parts.numbers,
    ]
    if job.after_stop != "exit":
        lines += [
            f"max_attempts={job.max_attempts}  # starts of this run, the first included",
            f"max_failures={job.max_failures}  # starts after a failure (a lost node), in a row",
        ]
    if job.after_stop == "chain":
        lines.append(f"script={quoted(job.script)}  # submitted again: correct it if you move it")
    out, failures = quoted(path_word(job.out)), quoted(f"{job.folder}/failures")
    if job.seeds:
        if job.array:
            lines.append(f"seeds=({' '.join(map(str, job.seeds))})")
            lines.append(f"seed=${{seeds[${parts.index}]}}")
        else:
            lines.append(f"seed={job.seeds[0]}")
        out, failures = f'{out}-seed-"$seed"', f'{failures}-seed-"$seed"'
    lines.append(f"out={out}  # the run folder")
    if job.after_stop != "exit":
        lines.append(f"failures={failures}  # a file with a number")
    return lines


def _setup(job: Job, site: Site) -> list[str]:
    lines = ["# Set-up. No `set -u` here: activation scripts often use variables that are not set."]
    if site.modules:
        lines.append(f"module load {words(site.modules)}")
    lines += site.setup
    if not job.container and job.program.path:
        lines.append(
            f'export PATH={quoted(job.program.path)}:"$PATH"  # of the hpctrain that wrote this'
        )
    if not job.container and job.program.python_path:
        lines.append(
            f"export PYTHONPATH={quoted(job.program.python_path)}"
            '"${PYTHONPATH:+:$PYTHONPATH}"  # it runs from its source folder'
        )
    lines += [f"export {name}={quoted(value)}" for name, value in _exported(job, site).items()]
    return [*lines, "set -u"]


def _exported(job: Job, site: Site) -> dict[str, str]:
    reach = dict.fromkeys(("OMPI_MCA_plm_rsh_agent", "PRTE_MCA_plm_ssh_agent"), site.agent)
    agent = {"OMPI_MCA_plm": "rsh", "PRTE_MCA_plm": "ssh", **reach} if site.agent else {}
    return {**agent, **site.environment, **job.environment}


def _environment(job: Job, parts: Parts) -> list[str]:
    base = "/tmp" if job.container else "${TMPDIR:-/tmp}"
    lines = [
        *parts.begin,
        f'cache="{base}/hpctrain-cache-$(id -u)"',
        *(f'export {name}="$cache{below}"' for name, below in _CACHES.items()),
        f"export OMP_NUM_THREADS={parts.threads} PYTHONUNBUFFERED=1",
    ]
    if job.container:
        lines.append("export PYTHONNOUSERSITE=1  # ~/.local does not belong to the image")
    return lines


def _launch(job: Job, site: Site, parts: Parts) -> list[str]:
    program_words = ("hpctrain",) if job.container else job.program.words
    program = site.container if job.container else program_words[0]
    lines = [
        f"for program in {words([site.launcher, program])}; do",
        '    if ! command -v "$program" >/dev/null; then',
        '        echo "job $job: no $program on PATH after the set-up" >&2',
        f"        exit {EXIT_BACKEND}",
        "    fi",
        "done",
        *parts.launch,
        *(_container(job, site) if job.container else ()),
        f"train=({words(program_words)} train)",
    ]
    if job.config is not None:
        lines.append(f"train+=({quoted(path_word(job.config))})")
    lines += [f"train+=(--set={quoted(text)})" for text in job.settings]
    if job.seeds:
        lines.append('train+=(--set=seed="$seed")')
    lines += ['train+=(--out="$out" --resume=auto)', *parts.walltime]
    return lines


def _container(job: Job, site: Site) -> list[str]:
    here = "here"  # stands where the GPU flag belongs
    every = exec_words(
        path_word(job.container),
        program=site.container,
        binds=[*site.binds, *job.binds],
        flags=site.container_flags,
        gpu=here,
    )
    cut = every.index(here)
    lines = [f"launch+=({words(every[:cut])})"]
    if job.gpus_per_node:
        lines += [
            "[ ! -e /dev/nvidiactl ] || launch+=(--nv)",
            "[ ! -e /dev/kfd ] || launch+=(--rocm)",
        ]
    return [*lines, f"launch+=({words(every[cut + 1 :])})"]


def _wait() -> list[str]:
    return [
        'echo "job $job: attempt $attempt, $(date)"',
        '"${launch[@]}" "${train[@]}" &',
        "launcher=$!",
        "while :; do",
        '    wait "$launcher"  # a trapped signal ends it early',
        '    kill -0 "$launcher" 2>/dev/null || break',
        "done",
        'wait "$launcher"  # its own exit code, also if a signal came in the last moment',
        "rc=$?",
        'echo "job $job: attempt $attempt ended with $rc, $(date)"',
    ]


def _after(job: Job, parts: Parts) -> list[str]:
    if job.after_stop == "exit":
        return [
            '[ -z "$told" ] || echo "job $job: told to end"',
            f'exit "$rc"  # {EXIT_STOPPED}: stopped early; submit this script again to go on',
        ]
    final = " | ".join(map(str, (*_FINAL, *_NO_COMMAND)))
    return [
        'if [ -n "$told" ]; then',
        '    echo "job $job: told to end; submit the script again to go on"',
        '    exit "$rc"',
        "fi",
        '[ "$attempt" -gt 1 ] || rm -f "$failures"',
        'case "$rc" in',
        "    0)",
        '        rm -f "$failures"',
        "        exit 0",
        "        ;;",
        f"    {EXIT_STOPPED}) # stopped early with a good checkpoint",
        '        rm -f "$failures"',
        f'        if [ -e "$out/STOP" ]{parts.unless_asked}; then',
        '            echo "job $job: ended by hpctrain stop; submit the script again to go on"',
        '            exit "$rc"',
        "        fi",
        "        ;;",
        f"    {final})",
        "        # hpctrain or the shell has said why; the same again would end the same way",
        '        exit "$rc"',
        "        ;;",
        "    *) # ranks or the launcher were killed",
        '        failed=$(($(cat "$failures" 2>/dev/null || echo 0) + 1))',
        '        if [ ! -d "$out/checkpoints" ] || [ "$failed" -gt "$max_failures" ]; then',
        '            echo "job $job: not started again after failure $failed ($rc)"',
        '            exit "$rc"',
        "        fi",
        '        echo "$failed" >"$failures"',
        "        ;;",
        "esac",
        'if [ "$attempt" -ge "$max_attempts" ]; then',
        '    echo "job $job: $max_attempts attempts are over; submit the script again to go on"',
        '    exit "$rc"',
        "fi",
        *(parts.requeue if job.after_stop == "requeue" else parts.chain),
        'exit "$rc"',
    ]
