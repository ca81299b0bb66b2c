"""Programs that stand in for launchers, SLURM's commands and hpctrain when job scripts are run.

`hpctrain` takes one word of a plan per start:

    75          exits with that number, having begun to train (the run folder is there)
    fresh:137   the same, before it began to train
    stop:75     the same, and somebody asked with a STOP file
    kill        dies of SIGKILL in mid-training
    wait        trains until SIGUSR1 asks it to stop, then saves for a while and exits 75
    file        the same, asked by a STOP file; dies of SIGUSR1
    qdel        asks PBS to delete its own job, and trains on
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HPCTRAIN = r"""#!/bin/bash
n=$(($(cat "$FAKE/starts" 2>/dev/null || echo 0) + 1))
echo "$n" >"$FAKE/starts"
printf '%s\0' "$@" >"$FAKE/arguments-$n"
env -0 >"$FAKE/environment-$n"
for word in "$@"; do
    case "$word" in --out=*) out=${word#--out=} ;; esac
done
step=$(sed -n "${n}p" "$FAKE/plan")
case "$step" in fresh:*) exit "${step#fresh:}" ;; esac
mkdir -p "$out/checkpoints"
rm -f "$out/STOP"
case "$step" in
stop:*) touch "$out/STOP"; exit "${step#stop:}" ;;
kill) kill -9 $$ ;;
wait) trap 'asked=yes' USR1 ;;
file) ;;
qdel) qdel "$PBS_JOBID" ;;
*) exit "${step:-0}" ;;
esac
touch "$FAKE/training"
while [ -z "${asked-}" ] && [ ! -e "$out/STOP" ]; do sleep 0.02; done
sleep 0.3
exit 75
"""

LAUNCHER = r"""#!/bin/bash
printf '%s\0' "$@" >"$FAKE/launcher"
while [ $# -gt 0 ]; do
    case "$1" in
    --hostfile | -f) cp "$2" "$FAKE/hosts"; shift ;;
    hpctrain) exec "$@" ;;
    esac
    shift
done
"""

COMMAND = r"""#!/bin/bash
printf '%s\0' "$@" >>"$FAKE/${0##*/}"
printf '%s\n' "${SLURM_RESTART_COUNT-unset} ${HPCTRAIN_ATTEMPT-unset}" >>"$FAKE/${0##*/}-saw"
cat "$FAKE/${0##*/}-says" 2>/dev/null
exit "$(cat "$FAKE/${0##*/}-code" 2>/dev/null || echo 0)"
"""


class Fakes:
    """A folder of such programs, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        programs = dict.fromkeys(("srun", "mpirun", "mpiexec"), LAUNCHER)
        for name, text in {**programs, "hpctrain": HPCTRAIN, "apptainer": COMMAND}.items():
            self.add(name, text)

    def add(self, name: str, text: str = COMMAND) -> None:
        """Put a program there; by default one that records its words."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def plan(self, *steps: str | int) -> None:
        """What hpctrain does, start by start; the counting begins anew."""
        (self.folder / "plan").write_text("".join(f"{step}\n" for step in steps))
        (self.folder / "starts").unlink(missing_ok=True)

    @property
    def starts(self) -> int:
        """How often hpctrain was started."""
        path = self.folder / "starts"
        return int(path.read_text()) if path.exists() else 0

    def words(self, name: str) -> list[str]:
        """Words a program was called with; of several calls, one after the other."""
        path = self.folder / name
        data = path.read_bytes() if path.exists() else b""
        return [os.fsdecode(word) for word in data.split(b"\0")[:-1]]

    def arguments(self, start: int = 1) -> list[str]:
        """Words of one start of hpctrain."""
        return self.words(f"arguments-{start}")

    def environment(self, start: int = 1) -> dict[str, str]:
        """Variables of one start of hpctrain."""
        pairs = (word.partition("=") for word in self.words(f"environment-{start}"))
        return {name: value for name, _, value in pairs}

    def variables(self, **more: object) -> dict[str, str]:
        """The environment of a SLURM batch script, as far as ours look at it."""
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "FAKE": str(self.folder),
            "TMPDIR": str(self.folder),
            "LC_ALL": "C.UTF-8",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "3",
            **{name: str(value) for name, value in more.items()},
        }

    def start(self, script: str, cwd: Path, **more: object) -> subprocess.Popen[str]:
        """Start a job script as SLURM's batch step does."""
        path = self.folder / "script"
        path.write_bytes(os.fsencode(script))
        return subprocess.Popen(
            ["bash", str(path)],
            cwd=cwd,
            env=self.variables(**more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, cwd: Path, **more: object) -> tuple[int, str]:
        """Exit code and output of a job script."""
        process = self.start(script, cwd, **more)
        said, _ = process.communicate(timeout=30)
        return process.returncode, said
