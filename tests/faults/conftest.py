"""Whole jobs, started the way people start them, with something going wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recorded import lines

ROOT = Path(__file__).resolve().parents[2]
HPCTRAIN = (sys.executable, "-m", "hpctrain")
BASE = """
[data]
kind = "digits"
[model]
kind = "misbehaving:calm"
[lr]
base = 0.05
[batch]
batch_global = 96
[record]
every_steps = 1
plain_every_s = 0.5
[train]
epochs = 2
"""


class Job:
    """One launched training job."""

    def __init__(self, ranks: int, command: list[str], cwd: Path, **environment: str) -> None:
        variables = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'faults'}",
        }
        command = [str(ROOT / "tools" / "launch"), str(ranks), "--", *command]
        self.out = cwd / f"out-{time.monotonic_ns()}.txt"
        self.err = self.out.with_suffix(".err")
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                command, cwd=cwd, stdout=out, stderr=err, env=variables | environment,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def wait(self, limit_s: float = 90) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"still running after {limit_s:g} s\n{self.text()}")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def text(self) -> str:
        """Everything the job said, stdout before stderr."""
        return self.out.read_text() + self.err.read_text()

    def ranks(self) -> list[int]:
        """Process ids of the training processes, found below the launcher."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                children.setdefault(int(stat[1]), []).append(int(entry.name))
        found, stack = [], [self.process.pid]
        while stack:
            pid = stack.pop()
            stack += children.get(pid, [])
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"hpctrain" in words and words[0].endswith((b"python", b"python3")):
                found.append(pid)
        return sorted(found)


class Jobs:
    """Starts jobs in a fresh folder with the calm base configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Job] = []
        (folder / "base.toml").write_text(BASE)

    def start(self, ranks: int, *arguments: str, config: str = "", **environment: str) -> Job:
        """`hpctrain train` with the base configuration and these arguments."""
        path = self.folder / f"config-{len(self.started)}.toml"
        path.write_text(f'base = "base.toml"\nname = "job"\n{config}')
        return self.command(ranks, "train", str(path), *arguments, **environment)

    def command(self, ranks: int, *arguments: str, **environment: str) -> Job:
        """`hpctrain` with these arguments."""
        return self.run(ranks, *HPCTRAIN, *arguments, **environment)

    def run(self, ranks: int, *command: str, **environment: str) -> Job:
        """Any program."""
        job = Job(ranks, list(command), self.folder, **environment)
        self.started.append(job)
        return job


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path)
    yield jobs
    for job in jobs.started:
        job.kill()


def wait_for_step(run: Path, step: int, job: Job, limit_s: float = 60) -> None:
    """Return once the run has recorded `step`."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if any(line["step"] >= step for line in lines(run)):
            return
        if job.process.poll() is not None:
            break
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached\n{job.text()}")
