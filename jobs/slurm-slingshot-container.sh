#!/bin/bash
# Trains configs/fashion-cnn.toml on 8 x 4 ranks. Written by
#     hpctrain submit configs/fashion-cnn.toml --site slingshot-slurm --nodes 8 --gpus-per-node 4 --cpus-per-rank 16 --time 6h --container hpctrain-mpich.sif --out runs/fashion-1 --account project1
# for the site slingshot-slurm (template: Cray EX with Slingshot, SLURM).
# It is yours to keep and to change. Submit it in the folder where it was written:
#     sbatch runs/fashion-1.job/job-001.sh
# See how it stands: hpctrain status runs/fashion-1
# Save and end it for good: hpctrain stop runs/fashion-1
#SBATCH --job-name=fashion-1
#SBATCH --output=runs/fashion-1.job/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=06:00:00
#SBATCH --gpus-per-node=4
#SBATCH --account=project1

limit_s=21600  # the time limit above, in seconds
ranks_per_node=4
max_attempts=20  # starts of this run, the first included
max_failures=2  # starts after a failure (a lost node), in a row
out=runs/fashion-1  # the run folder
failures=runs/fashion-1.job/failures  # a file with a number

told=  # not empty: somebody ended the job
launcher=
# Both ask the ranks to save and stop; TERM (scancel, the time limit) for good.
asked=  # not empty: by the file STOP
trap 'if [ -n "$launcher" ] && touch "$out/STOP"; then asked=yes; fi' USR1
trap 'told=yes; kill -USR1 $$' TERM

# Set-up. No `set -u` here: activation scripts often use variables that are not set.
export MPICH_GPU_SUPPORT_ENABLED=0
set -u

job="$SLURM_JOB_ID"
attempt=$((${HPCTRAIN_ATTEMPT:-1} + ${SLURM_RESTART_COUNT:-0}))
unset HPCTRAIN_ATTEMPT
cache="/tmp/hpctrain-cache-$(id -u)"
export XDG_CACHE_HOME="$cache"
export MIOPEN_USER_DB_PATH="$cache/miopen"
export MPLCONFIGDIR="$cache/matplotlib"
export TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
export TRITON_CACHE_DIR="$cache/triton"
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK" PYTHONUNBUFFERED=1
export PYTHONNOUSERSITE=1  # ~/.local does not belong to the image

for program in srun apptainer; do
    if ! command -v "$program" >/dev/null; then
        echo "job $job: no $program on PATH after the set-up" >&2
        exit 69
    fi
done
ranks=$((SLURM_JOB_NUM_NODES * ranks_per_node))
launch=(srun --ntasks="$ranks" --ntasks-per-node="$ranks_per_node")
launch+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
# Ranks leave one by one: killed with the first, they would hide its code (75). What is
# left half a minute later hangs, and is killed.
launch+=(--kill-on-bad-exit=0 --wait=30)
launch+=(--cpu-bind=cores)
launch+=(apptainer exec --sharens)
[ ! -e /dev/nvidiactl ] || launch+=(--nv)
[ ! -e /dev/kfd ] || launch+=(--rocm)
launch+=(--bind /opt/cray --bind /var/spool/slurmd hpctrain-mpich.sif)
train=(hpctrain train)
train+=(configs/fashion-cnn.toml)
train+=(--out="$out" --resume=auto)
# hpctrain reads SLURM_JOB_END_TIME, which SLURM sets from 23.02 on.
[ -n "${SLURM_JOB_END_TIME:-}" ] || train+=(--walltime="$((limit_s - SECONDS))")

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
        if [ -e "$out/STOP" ] && [ -z "$asked" ]; then
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
echo "job $job: back into the queue"
scontrol requeue "$job"  # the last action: SLURM now ends this script
exit "$rc"
