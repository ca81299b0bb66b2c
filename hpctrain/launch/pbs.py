"""Job scripts for PBS Pro and OpenPBS, and what its commands say.

Why a script looks as it does (measured on OpenPBS 23.06):

- No signals: `qsig -s USR1` kills the login shell around the script and with it the job. The ranks
  know the deadline (--walltime), and a person uses `hpctrain stop`.
- A user may not requeue a job. After exit 75 the script submits its continuation, which waits for
  the end of this job with afternotok; so none is left over when a run completes.
- No comments among the directives; a job starts in $HOME, with a bare environment.
"""

from __future__ import annotations

import json

from hpctrain.launch.job import Job, clock
from hpctrain.launch.script import Parts, assemble, flags, forward_by_open_mpi
from hpctrain.launch.site import Site

SUBMIT = ("qsub",)
NEVER = "Can Never Run"


def render(job: Job, site: Site) -> str:
    """The job script. Local, pure."""
    return assemble(
        job,
        site,
        Parts(
            submit="qsub",
            directives=[f"#PBS {text}" for text in _directives(job, site)],
            index="PBS_ARRAY_INDEX",
            numbers=(f"cpus_per_rank={job.cpus_per_rank}",),
            start=(
                "trap 'told=yes' TERM  # qdel, or the time limit",
                'cd "$PBS_O_WORKDIR" || exit 73',
            ),
            begin=('job="$PBS_JOBID"', "attempt=${HPCTRAIN_ATTEMPT:-1}", "unset HPCTRAIN_ATTEMPT"),
            threads='"$cpus_per_rank"',
            launch=[
                'nodes=$(sort -u "$PBS_NODEFILE" | wc -l)',
                "ranks=$((nodes * ranks_per_node))",
                *(_pals(job, site) if site.launcher == "mpiexec" else _mpirun(job, site)),
            ],
            walltime=('train+=(--walltime="$((limit_s - SECONDS))")',),
            unless_asked="",
            requeue=(),
            chain=_chain(job),
        ),
    )


def comment(text: str) -> str:
    """The server's remark about a job, from `qstat -f -F json`; "" if there is none. Local, pure.

    Raises:
        ValueError: the text is not what that command prints.
    """
    jobs = json.loads(text)["Jobs"]
    return " ".join(str(job.get("comment", "")) for job in jobs.values()).strip()


def _directives(job: Job, site: Site) -> list[str]:
    chunk = [
        f"{job.nodes}:ncpus={job.ranks_per_node * job.cpus_per_rank}",
        f"mpiprocs={job.ranks_per_node}",
        *([f"ngpus={job.gpus_per_node}"] if job.gpus_per_node else ()),
        *site.chunk,
    ]
    found = [
        f"-N {job.name}",
        f"-o {job.folder}/",
        "-j oe",
        *(["-k oed"] if site.direct_output else ()),
        "-r n" if job.after_stop == "exit" and not job.array else "-r y",
        f"-l select={':'.join(chunk)}",
        f"-l place={site.place}",
        f"-l walltime={clock(job.limit_s, days=False)}",
    ]
    if job.array:
        found.append(f"-J 0-{len(job.seeds) - 1}")
    if job.queue:
        found.append(f"-q {job.queue}")
    if job.account:
        found.append(f"-A {job.account}")
    return [*found, *site.directives, *job.directives]


def _chain(job: Job) -> list[str]:
    attempt = '-v HPCTRAIN_ATTEMPT="$((attempt + 1))" "$script"'
    if job.array:
        return [
            "# An array of this task alone: PBS knows ranges only, and no dependency on one task.",
            'qsub -J "$PBS_ARRAY_INDEX-$((PBS_ARRAY_INDEX + 1)):2" ' + attempt,
        ]
    return ['qsub -W depend=afternotok:"$PBS_JOBID" ' + attempt]


def _pals(job: Job, site: Site) -> list[str]:
    default = '--ppn "$ranks_per_node" --depth "$cpus_per_rank" --cpu-bind depth'
    return [
        'launch=(mpiexec -n "$ranks")',
        *flags(job, site, default),
    ]


def _mpirun(job: Job, site: Site) -> list[str]:
    open_mpi = site.mpi == "openmpi"
    default = (
        '--map-by "ppr:$ranks_per_node:node" --bind-to none'
        if open_mpi
        else '-ppn "$ranks_per_node"'
    )
    slots, flag = (" slots=", "--hostfile") if open_mpi else (":", "-f")
    by_file = [
        "hostfile=$(mktemp) || exit 73",
        f'sort -u "$PBS_NODEFILE" | sed "s/\\$/{slots}$ranks_per_node/" >"$hostfile"',
        f'launch+=({flag} "$hostfile")',
    ]
    return [
        'launch=(mpirun -n "$ranks")',
        *(by_file if site.hosts == "nodefile" else ()),
        *flags(job, site, default),
        *(forward_by_open_mpi(job, site) if open_mpi else ()),
    ]
