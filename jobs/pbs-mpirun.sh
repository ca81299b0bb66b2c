#!/bin/bash
# Trains configs/fashion-cnn.toml on 4 x 2 ranks. Written by
#     hpctrain submit configs/fashion-cnn.toml --scheduler pbs --nodes 4 --ranks-per-node 2 --cpus-per-rank 8 --time 4h --queue workq --account project1 --env HPCTRAIN_DATA=/scratch/data
# for the site generic-pbs (any PBS Pro or OpenPBS cluster, Open MPI).
# It is yours to keep and to change. Submit it in the folder where it was written:
#     qsub runs/fashion-cnn.job/job-001.sh
# See how it stands: hpctrain status runs/fashion-cnn
# Save and end it for good: hpctrain stop runs/fashion-cnn
#PBS -N fashion-cnn
#PBS -o runs/fashion-cnn.job/
#PBS -j oe
#PBS -k oed
#PBS -r y
#PBS -l select=4:ncpus=16:mpiprocs=2
#PBS -l place=scatter
#PBS -l walltime=04:00:00
#PBS -q workq
#PBS -A project1

limit_s=14400  # the time limit above, in seconds
ranks_per_node=2
cpus_per_rank=8
max_attempts=20  # starts of this run, the first included
max_failures=2  # starts after a failure (a lost node), in a row
script=runs/fashion-cnn.job/job-001.sh  # submitted again: correct it if you move it
out=runs/fashion-cnn  # the run folder
failures=runs/fashion-cnn.job/failures  # a file with a number

told=  # not empty: somebody ended the job
launcher=
trap 'told=yes' TERM  # qdel, or the time limit
cd "$PBS_O_WORKDIR" || exit 73

# Set-up. No `set -u` here: activation scripts often use variables that are not set.
export PATH=/home/me/hpctrain/bin:"$PATH"  # of the hpctrain that wrote this
export HPCTRAIN_DATA=/scratch/data
set -u

job="$PBS_JOBID"
attempt=${HPCTRAIN_ATTEMPT:-1}
unset HPCTRAIN_ATTEMPT
cache="${TMPDIR:-/tmp}/hpctrain-cache-$(id -u)"
export XDG_CACHE_HOME="$cache"
export MIOPEN_USER_DB_PATH="$cache/miopen"
export MPLCONFIGDIR="$cache/matplotlib"
export TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
export TRITON_CACHE_DIR="$cache/triton"
export OMP_NUM_THREADS="$cpus_per_rank" PYTHONUNBUFFERED=1

for program in mpirun hpctrain; do
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
for name in PATH LD_LIBRARY_PATH PYTHONPATH HPCTRAIN_DATA XDG_CACHE_HOME MIOPEN_USER_DB_PATH MPLCONFIGDIR TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR OMP_NUM_THREADS PYTHONUNBUFFERED "${!HPCTRAIN_@}"; do
    [ -z "${!name+set}" ] || launch+=(-x "$name")
done
train=(hpctrain train)
train+=(configs/fashion-cnn.toml)
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
qsub -W depend=afternotok:"$PBS_JOBID" -v HPCTRAIN_ATTEMPT="$((attempt + 1))" "$script"
exit "$rc"
