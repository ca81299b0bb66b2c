#!/bin/bash
# Trains configs/novels-gpt.toml on 16 x 4 ranks. Written by
#     hpctrain submit configs/novels-gpt.toml --site pals-pbs --nodes 16 --gpus-per-node 4 --cpus-per-rank 8 --time 12h --queue prod --after-stop exit
# for the site pals-pbs (template: Cray EX with PALS, PBS).
# It is yours to keep and to change. Submit it in the folder where it was written:
#     qsub runs/novels-gpt.job/job-001.sh
# See how it stands: hpctrain status runs/novels-gpt
# Save and end it for good: hpctrain stop runs/novels-gpt
#PBS -N novels-gpt
#PBS -o runs/novels-gpt.job/
#PBS -j oe
#PBS -k oed
#PBS -r n
#PBS -l select=16:ncpus=32:mpiprocs=4:ngpus=4
#PBS -l place=scatter
#PBS -l walltime=12:00:00
#PBS -q prod

limit_s=43200  # the time limit above, in seconds
ranks_per_node=4
cpus_per_rank=8
out=runs/novels-gpt  # the run folder

told=  # not empty: somebody ended the job
launcher=
trap 'told=yes' TERM  # qdel, or the time limit
cd "$PBS_O_WORKDIR" || exit 73

# Set-up. No `set -u` here: activation scripts often use variables that are not set.
export PATH=/home/me/hpctrain/bin:"$PATH"  # of the hpctrain that wrote this
export MPICH_GPU_SUPPORT_ENABLED=0
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

for program in mpiexec hpctrain; do
    if ! command -v "$program" >/dev/null; then
        echo "job $job: no $program on PATH after the set-up" >&2
        exit 69
    fi
done
nodes=$(sort -u "$PBS_NODEFILE" | wc -l)
ranks=$((nodes * ranks_per_node))
launch=(mpiexec -n "$ranks")
launch+=(--ppn "$ranks_per_node" --depth "$cpus_per_rank" --cpu-bind depth)
train=(hpctrain train)
train+=(configs/novels-gpt.toml)
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

[ -z "$told" ] || echo "job $job: told to end"
exit "$rc"  # 75: stopped early; submit this script again to go on
