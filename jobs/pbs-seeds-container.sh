#!/bin/bash
# Trains configs/a9a-logistic.toml on 1 x 4 ranks, one task for each of 3 seeds. Written by
#     hpctrain submit configs/a9a-logistic.toml --scheduler pbs --ranks-per-node 4 --time 30m --seeds 1,2,3 --container hpctrain.sif
# for the site generic-pbs (any PBS Pro or OpenPBS cluster, Open MPI).
# It is yours to keep and to change. Submit it in the folder where it was written:
#     qsub runs/a9a-logistic.job/job-001.sh
# See how it stands: hpctrain status runs/a9a-logistic-seed-1
# Save and end it for good: hpctrain stop runs/a9a-logistic-seed-1
#PBS -N a9a-logistic
#PBS -o runs/a9a-logistic.job/
#PBS -j oe
#PBS -k oed
#PBS -r y
#PBS -l select=1:ncpus=4:mpiprocs=4
#PBS -l place=scatter
#PBS -l walltime=00:30:00
#PBS -J 0-2

limit_s=1800  # the time limit above, in seconds
ranks_per_node=4
cpus_per_rank=1
max_attempts=20  # starts of this run, the first included
max_failures=2  # starts after a failure (a lost node), in a row
script=runs/a9a-logistic.job/job-001.sh  # submitted again: correct it if you move it
seeds=(1 2 3)
seed=${seeds[$PBS_ARRAY_INDEX]}
out=runs/a9a-logistic-seed-"$seed"  # the run folder
failures=runs/a9a-logistic.job/failures-seed-"$seed"  # a file with a number

told=  # not empty: somebody ended the job
launcher=
trap 'told=yes' TERM  # qdel, or the time limit
cd "$PBS_O_WORKDIR" || exit 73

# Set-up. No `set -u` here: activation scripts often use variables that are not set.
set -u

job="$PBS_JOBID"
attempt=${HPCTRAIN_ATTEMPT:-1}
unset HPCTRAIN_ATTEMPT
cache="/tmp/hpctrain-cache-$(id -u)"
export XDG_CACHE_HOME="$cache"
export MIOPEN_USER_DB_PATH="$cache/miopen"
export MPLCONFIGDIR="$cache/matplotlib"
export TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
export TRITON_CACHE_DIR="$cache/triton"
export OMP_NUM_THREADS="$cpus_per_rank" PYTHONUNBUFFERED=1
export PYTHONNOUSERSITE=1  # ~/.local does not belong to the image

for program in mpirun apptainer; do
    if ! command -v "$program" >/dev/null; then
        echo "job $job: no $program on PATH after the set-up" >&2
        exit 69
    fi
done
nodes=$(sort -u "$PBS_NODEFILE" | wc -l)
ranks=$((nodes * ranks_per_node))
launch=(mpirun -n "$ranks")
hostfile=$(mktemp) || exit 73
sort -u "$PBS_NODEFILE" | sed "s/\$/ slots=$ranks_per_node/" >"$hostfile"
launch+=(--hostfile "$hostfile")
launch+=(--map-by "ppr:$ranks_per_node:node" --bind-to none)
for name in PATH LD_LIBRARY_PATH PYTHONPATH XDG_CACHE_HOME MIOPEN_USER_DB_PATH MPLCONFIGDIR TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR OMP_NUM_THREADS PYTHONUNBUFFERED "${!HPCTRAIN_@}"; do
    [ -z "${!name+set}" ] || launch+=(-x "$name")
done
launch+=(apptainer exec --sharens)
launch+=(hpctrain.sif)
train=(hpctrain train)
train+=(configs/a9a-logistic.toml)
train+=(--set=seed="$seed")
train+=(--out="$out" --resume=auto)
train+=(--walltime="$((limit_s - SECONDS))")

echo "job $job: attempt $attempt, $(date)"
"${launch[@]}" "${train[@]}" &
launcher=$!
while :; do
    wait "$launcher"  # a trapped signal ends it early
    kill -0 "$launcher" 2>/dev/null || break
done
wait "$launcher"  # its own exit code, also if a signal came in the last moment
rc=$?
echo "job $job: attempt $attempt ended with $rc, $(date)"

if [ -n "$told" ]; then
    echo "job $job: told to end; submit the script again to go on"
    exit "$rc"
fi
[ "$attempt" -gt 1 ] || rm -f "$failures"
case "$rc" in
    0)
        rm -f "$failures"
        exit 0
        ;;
    75) # stopped early with a good checkpoint
        rm -f "$failures"
        if [ -e "$out/STOP" ]; then
            echo "job $job: ended by hpctrain stop; submit the script again to go on"
            exit "$rc"
        fi
        ;;
    2 | 65 | 69 | 70 | 73 | 78 | 126 | 127)
        # hpctrain or the shell has said why; the same again would end the same way
        exit "$rc"
        ;;
    *) # ranks or the launcher were killed
        failed=$(($(cat "$failures" 2>/dev/null || echo 0) + 1))
        if [ ! -d "$out/checkpoints" ] || [ "$failed" -gt "$max_failures" ]; then
            echo "job $job: not started again after failure $failed ($rc)"
            exit "$rc"
        fi
        echo "$failed" >"$failures"
        ;;
esac
if [ "$attempt" -ge "$max_attempts" ]; then
    echo "job $job: $max_attempts attempts are over; submit the script again to go on"
    exit "$rc"
fi
# An array of this task alone: PBS knows ranges only, and no dependency on one task.
qsub -J "$PBS_ARRAY_INDEX-$((PBS_ARRAY_INDEX + 1)):2" -v HPCTRAIN_ATTEMPT="$((attempt + 1))" "$script"
exit "$rc"
