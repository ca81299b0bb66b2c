"""The job scripts under jobs/: what `hpctrain submit --dry-run` prints for the commands below.

    python tests/golden_jobs.py        # from the repository's root: write them anew

A test renders them again and compares every byte.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

JOBS = Path(__file__).resolve().parents[1] / "jobs"

COMMANDS = {
    "slurm-srun.sh": "configs/fashion-cnn.toml --scheduler slurm --nodes 4 --ranks-per-node 2 "
    "--cpus-per-rank 8 --time 4h --partition main --account project1",
    "slurm-mpirun-gpu.sh": "configs/novels-gpt.toml --scheduler slurm --launcher mpirun --nodes 2 "
    "--gpus-per-node 4 --cpus-per-rank 12 --time 1d --after-stop chain --set lr.base=0.0006 "
    "--env HPCTRAIN_DATA=/scratch/data --directive=--constraint=a100",
    "slurm-seeds.sh": "configs/a9a-logistic.toml --scheduler slurm --ranks-per-node 4 --time 30m "
    "--seeds 0-4",
    "slurm-slingshot-container.sh": "configs/fashion-cnn.toml --site slingshot-slurm --nodes 8 "
    "--gpus-per-node 4 --cpus-per-rank 16 --time 6h --container hpctrain-mpich.sif "
    "--out runs/fashion-1 --account project1",
    "pbs-mpirun.sh": "configs/fashion-cnn.toml --scheduler pbs --nodes 4 --ranks-per-node 2 "
    "--cpus-per-rank 8 --time 4h --queue workq --account project1 "
    "--env HPCTRAIN_DATA=/scratch/data",
    "pbs-seeds-container.sh": "configs/a9a-logistic.toml --scheduler pbs --ranks-per-node 4 "
    "--time 30m --seeds 1,2,3 --container hpctrain.sif",
    "pbs-pals.sh": "configs/novels-gpt.toml --site pals-pbs --nodes 16 --gpus-per-node 4 "
    "--cpus-per-rank 8 --time 12h --queue prod --after-stop exit",
}
"""File -> arguments of `hpctrain submit`."""


def rendered(arguments: str) -> str:
    """The script for these arguments, for an hpctrain installed in /home/me/hpctrain."""
    from hpctrain.cli import run_command_line
    from hpctrain.launch.job import Program

    words = ["submit", *arguments.split(), "--dry-run"]
    program = Program(path="/home/me/hpctrain/bin")
    printed = io.StringIO()
    with (
        mock.patch("hpctrain.launch.job.this_program", return_value=program),
        mock.patch.object(sys, "argv", ["hpctrain", *words]),
        mock.patch.dict(os.environ, {"PATH": "/nowhere", "HOME": str(JOBS.parent)}, clear=True),
        contextlib.redirect_stdout(printed),
    ):
        here = os.getcwd()
        os.chdir(JOBS.parent)
        try:
            code = run_command_line(words)
        finally:
            os.chdir(here)
    assert code == 0, f"hpctrain {' '.join(words)} ended with {code}"
    return printed.getvalue()


if __name__ == "__main__":
    for name, arguments in COMMANDS.items():
        (JOBS / name).write_text(rendered(arguments))
