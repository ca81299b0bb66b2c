"""Job scripts for SLURM, and what its commands say.

Why a script looks as it does (measured on SLURM 22.05; read up to 24.11):

- `--signal=USR1@N` reaches the ranks of srun; with mpirun only the batch shell (`B:`) may get it,
  which passes it on, since SLURM's own signal would go to all processes at once.
- With a container, too, only the batch shell gets it, and asks the ranks by a STOP file: of
  SIGUSR1 Apptainer's own processes between srun and a rank (--sharens) die, and the rank with them.
- `scontrol requeue` ends the running job at once, so it is the last thing a script does.
- srun takes the cores of a rank from its command line: whether it inherits them changed twice.
- Without `--open-mode=append` a requeued job truncates its own log.
"""

from __future__ import annotations

from hpctrain.launch.job import Job, clock, quoted
from hpctrain.launch.script import Parts, assemble, flags, forward_by_open_mpi
from hpctrain.launch.site import Site

SUBMIT = ("sbatch", "--parsable")
TEST = ("sbatch", "--test-only")


def render(job: Job, site: Site) -> str:
    """The job script. Local, pure."""
    return assemble(
        job,
        site,
        Parts(
            submit="sbatch",
            directives=[f"#SBATCH {text}" for text in _directives(job, site)],
            index="SLURM_ARRAY_TASK_ID",
            numbers=(),
            start=(
                "# Both ask the ranks to save and stop; TERM (scancel, the time limit) for good.",
                *_on_usr1(job),
                "trap 'told=yes; kill -USR1 $$' TERM",
            ),
            begin=(
                'job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
                if job.array
                else 'job="$SLURM_JOB_ID"',
                "attempt=$((${HPCTRAIN_ATTEMPT:-1} + ${SLURM_RESTART_COUNT:-0}))",
                "unset HPCTRAIN_ATTEMPT",
            ),
            threads='"$SLURM_CPUS_PER_TASK"',
            launch=[
                "ranks=$((SLURM_JOB_NUM_NODES * ranks_per_node))",
                *(_srun(job, site) if site.launcher == "srun" else _mpirun(job, site)),
            ],
            walltime=(
                "# hpctrain reads SLURM_JOB_END_TIME, which SLURM sets from 23.02 on.",
                '[ -n "${SLURM_JOB_END_TIME:-}" ] || train+=(--walltime="$((limit_s - SECONDS))")',
            ),
            unless_asked=' && [ -z "$asked" ]' if job.container else "",
            requeue=(
                'echo "job $job: back into the queue"',
                'scontrol requeue "$job"  # the last action: SLURM now ends this script',
            ),
            chain=(
                "unset SLURM_RESTART_COUNT  # it would reach the next job",
                'sbatch --export=ALL,HPCTRAIN_ATTEMPT="$((attempt + 1))" '
                + ('--array="$SLURM_ARRAY_TASK_ID" ' if job.array else "")
                + '"$script"',
            ),
        ),
    )


def _on_usr1(job: Job) -> list[str]:
    if not job.container:
        return ["""trap '[ -z "$launcher" ] || kill -USR1 "$launcher" 2>/dev/null' USR1"""]
    return [
        "asked=  # not empty: by the file STOP",
        """trap 'if [ -n "$launcher" ] && touch "$out/STOP"; then asked=yes; fi' USR1""",
    ]


def log_name(job: Job) -> str:
    """File name of the log in the job's folder, with SLURM's own place-holders. Local, pure."""
    return "slurm-%A_%a.log" if job.array else "slurm-%j.log"


def _directives(job: Job, site: Site) -> list[str]:
    batch_only = "" if site.launcher == "srun" and not job.container else "B:"
    found = [
        f"--job-name={job.name}",
        f"--output={job.folder}/{log_name(job)}",
        "--open-mode=append",
        "--no-requeue" if job.after_stop == "exit" else "--requeue",
        f"--signal={batch_only}USR1@{job.lead}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--cpus-per-task={job.cpus_per_rank}",
        f"--time={clock(job.limit_s, days=True)}",
    ]
    if job.gpus_per_node:
        kind = "gres=gpu:" if site.gpu_request == "gres" else "gpus-per-node="
        found.append(f"--{kind}{job.gpus_per_node}")
    if job.array:
        found.append(f"--array=0-{len(job.seeds) - 1}")
    if job.queue:
        found.append(f"--partition={job.queue}")
    if job.account:
        found.append(f"--account={job.account}")
    return [*found, *site.directives, *job.directives]


def _srun(job: Job, site: Site) -> list[str]:
    mpi = f" --mpi={quoted(site.srun_mpi)}" if site.srun_mpi else ""
    return [
        f'launch=(srun{mpi} --ntasks="$ranks" --ntasks-per-node="$ranks_per_node")',
        'launch+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")',
        "# Ranks leave one by one: killed with the first, they would hide its code (75). What is",
        "# left half a minute later hangs, and is killed.",
        "launch+=(--kill-on-bad-exit=0 --wait=30)",
        *flags(job, site, ""),
    ]


def _mpirun(job: Job, site: Site) -> list[str]:
    if site.mpi == "mpich":
        return [
            'launch=(mpirun -n "$ranks")',
            *flags(job, site, '-ppn "$ranks_per_node"'),
        ]
    default = '--map-by "ppr:$ranks_per_node:node" --bind-to none'
    return [
        'launch=(mpirun -n "$ranks")',
        *flags(job, site, default),
        *forward_by_open_mpi(job, site),
    ]
