"""Fixtures for all tests: real data, and programs started under the launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDI_", "HYDRA_", "MPI_LOCAL", "MPIEXEC_")

# The same examples on every rank and in every run, and no verdict that depends on speed.
settings.register_profile("hpctrain", derandomize=True, deadline=None, database=None)
settings.load_profile("hpctrain")


def pytest_configure() -> None:
    # Fixtures that started jobs then end them also when the test run itself is told to end.
    # (Under mpirun the launcher ends the ranks, and tests of signals set handlers of their own.)
    if not any(name.startswith(LAUNCHER_VARIABLES) for name in os.environ):
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets: $HPCTRAIN_DATA, else ../shared/data beside the repository.

    A test that needs it is skipped where there is none, and fails if HPCTRAIN_REQUIRE_DATA=1.
    """
    given = os.environ.get("HPCTRAIN_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if folder.is_dir():
        return folder.resolve()
    reason = f"no real data: {folder} is no folder (set HPCTRAIN_DATA)"
    if os.environ.get("HPCTRAIN_REQUIRE_DATA") == "1":
        pytest.fail(f"{reason}, and HPCTRAIN_REQUIRE_DATA=1")
    pytest.skip(reason)


def outside_any_launch() -> dict[str, str]:
    """This environment without the launcher's variables, as for a job started from a shell."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)
    }


Launched = subprocess.Popen[str]


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., Launched]]:
    """`start_ranks(2, "-m", "hpctrain", ...)`: Python as 2 ranks, as a Popen with text pipes.

    Keyword arguments: `env` adds variables, `cwd` is the working directory. Local, also under
    mpirun. What still runs when the test is over is killed, all its processes included.
    """
    started: list[Launched] = []

    def start(
        ranks: int, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> Launched:
        command = [str(ROOT / "tools" / "launch"), str(ranks), "--", sys.executable]
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            env={**outside_any_launch(), **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        end(process)
        for stream in (process.stdout, process.stderr):
            stream.close()


@pytest.fixture
def run_ranks(
    start_ranks: Callable[..., Launched],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `start_ranks`, but waits for the end; fails the test after `limit_s` (default 60)."""

    def run(
        ranks: int, *arguments: str | Path, limit_s: float = 60, **options: object
    ) -> subprocess.CompletedProcess[str]:
        process = start_ranks(ranks, *arguments, **options)
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            end(process)
            out, err = process.communicate()
            pytest.fail(f"not done after {limit_s:g} s; stdout:\n{out}\nstderr:\n{err}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def end(process: Launched) -> None:
    """Kill a launch: mpirun gets a moment to take its ranks along, then what is left goes too."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
