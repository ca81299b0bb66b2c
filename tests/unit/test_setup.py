"""The parts of set-up that need no network: tools/*.py, tools/setup, tools/launch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import build_horovod
import mpi_site
import pytest
import steps
from steps import SetupError

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "tools" / "launch"


def program(folder: Path, name: str, text: str = "exit 0") -> Path:
    """An executable shell script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# Which MPI


def test_complete_mpi_on_path_is_the_site_s(tmp_path):
    mpirun = program(tmp_path / "bin", "mpirun")
    mpicxx = program(tmp_path / "bin", "mpicxx")
    site, note = mpi_site.find(tmp_path / ".venv", str(tmp_path / "bin"))
    assert site == mpi_site.SiteMpi(mpirun, mpicxx)
    assert note == ""
    before = site.identity()
    program(tmp_path / "bin", "mpicxx", "echo upgraded in place")
    assert site.identity() != before


def test_mpi_of_the_own_environment_is_not_the_site_s(tmp_path):
    for name in ("mpirun", "mpicxx"):
        program(tmp_path / "bin", name)
    assert mpi_site.find(tmp_path, str(tmp_path / "bin")) == (None, "")


def test_launcher_without_compiler_is_said(tmp_path):
    program(tmp_path / "bin", "mpirun")
    site, note = mpi_site.find(tmp_path / ".venv", str(tmp_path / "bin"))
    assert site is None
    assert "no mpicxx beside it" in note


def test_compiler_without_launcher_is_refused(tmp_path):
    program(tmp_path / "bin", "mpicxx")
    with pytest.raises(SetupError, match="half an MPI"):
        mpi_site.find(tmp_path / ".venv", str(tmp_path / "bin"))


def test_broken_mpi_compiler_is_refused(tmp_path):
    broken = program(tmp_path / "bin", "mpicxx", "echo no licence >&2; exit 3")
    with pytest.raises(SetupError, match="no licence"):
        mpi_site.version_of_compiler(broken, os.environ)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Open MPI v5.0.11, package: Open MPI user@host Distribution\n", "Open MPI v5.0.11"),
        ("MPICH Version:      5.0.2\nMPICH Release date: today\n", "MPICH Version: 5.0.2"),
        ("", ""),
    ],
)
def test_library_version(text, version):
    assert mpi_site.library_version(text) == version


# Horovod


def source_tree(folder: Path, standard: str) -> Path:
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"project(horovod CXX)\nset(CMAKE_CXX_STANDARD {standard})\n")
    return folder


@pytest.mark.parametrize("own_mpi", [True, False])
def test_patch(tmp_path, own_mpi):
    source = source_tree(tmp_path, "14")
    build_horovod.patch(source, own_mpi)
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        assert "set(CMAKE_CXX_STANDARD 17)" in (source / name).read_text()
    text = (source / "CMakeLists.txt").read_text()
    assert text.startswith("project(horovod CXX)\n")
    assert ("$ORIGIN/../../../.." in text) is own_mpi
    assert f"USE_LINK_PATH {'OFF' if own_mpi else 'ON'}" in text


def test_patch_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(SetupError, match="0 times instead of once"):
        build_horovod.patch(source_tree(tmp_path, "20"), own_mpi=True)


def test_unknown_source_archive_is_refused(tmp_path):
    archive = tmp_path / "horovod-0.28.1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source_tree(tmp_path / "horovod-0.28.1", "14"), "horovod-0.28.1")
    with pytest.raises(SetupError, match="sha256"):
        build_horovod.unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wheel_key_covers_what_the_library_depends_on(tmp_path):
    def key(torch="2.13.0+cpu", mpi="Open MPI v5.0.11", own=True, at="/opt/a/mpicxx", env=None):
        return build_horovod.wheel_key(torch, mpi, own, Path(at), env or {})

    keys = [
        key(),
        key(torch="2.12.0"),
        key(mpi="Open MPI v4.1.4"),
        key(own=False),
        key(own=False, at="/opt/b/mpicxx"),
        key(env={"HOROVOD_GPU": "CUDA"}),
    ]
    assert len(set(keys)) == len(keys)
    assert key(at="/opt/b/mpicxx") == key()  # an own MPI is found beside the packages
    assert key(env={"HOROVOD_FUSION_THRESHOLD": "0"}) == key()  # not a build setting
    assert all(set(k) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for k in keys)


# Commands, locks, remedies


def test_failed_command_shows_its_end_and_a_remedy(tmp_path):
    commands = steps.Commands(tmp_path / "log", os.environ)
    with pytest.raises(SetupError) as caught:
        commands.run("installing x", ["sh", "-c", "echo No space left on device; exit 4"])
    text = str(caught.value)
    assert "installing x failed with code 4" in text
    assert "| No space left on device" in text
    assert "The disk or the quota is full" in text
    assert str(tmp_path / "log") in text


def test_slow_command_is_ended_with_its_children(tmp_path):
    commands = steps.Commands(tmp_path / "log", os.environ)
    script = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
    with pytest.raises(SetupError, match="not done after 1 s"):
        commands.run("waiting", ["sh", "-c", script], limit_s=1)
    assert_gone(int((tmp_path / "pid").read_text()))


def assert_gone(pid: int) -> None:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


HOLD_LOCK = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import steps
with steps.locked(Path(sys.argv[2]), "set-up"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_excludes_a_second_run_and_ends_with_the_process(tmp_path, capsys):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD_LOCK, ROOT / "tools", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert "waiting for it" in second.stdout.readline()
        holder.send_signal(signal.SIGKILL)
        assert second.stdout.readline() == "held\n"
        second.kill()
        second.communicate()


def test_no_compiler_is_said_with_a_remedy(tmp_path):
    with pytest.raises(SetupError, match=r"no C\+\+ compiler found(.|\n)*install g\+\+"):
        steps.check_compiler({"PATH": str(tmp_path)})


def test_old_compiler_is_said(tmp_path):
    program(tmp_path, "c++", "echo unknown option -std=c++17 >&2; exit 1")
    with pytest.raises(SetupError, match=r"does not compile C\+\+17(.|\n)*unknown option"):
        steps.check_compiler({"PATH": str(tmp_path)})


def test_environment_of_commands_leaks_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/site/modules")
    monkeypatch.setenv("MAKEFLAGS", "w -- CXX=x")
    monkeypatch.setenv("MPI4PY_MPIABI", "")
    env = steps.clean_environment(tmp_path)
    assert not {"PYTHONPATH", "MAKEFLAGS", "MPI4PY_MPIABI"} & env.keys()
    assert env["PATH"].split(os.pathsep)[0] == str(tmp_path)


def copy_of_tools(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path / "tools"


def test_setup_without_a_compiler_changes_nothing(tmp_path):
    tools = copy_of_tools(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("sh", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [tools / "setup"],
        env={"PATH": str(tmp_path / "bin"), "PYTHON": sys.executable, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("setup: no C++ compiler found")
    assert not (tmp_path / ".venv").exists()


def test_setup_leaves_an_environment_of_somebody_else_alone(tmp_path):
    tools = copy_of_tools(tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "mine").touch()
    done = subprocess.run(
        [tools / "setup"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "was not made by this set-up" in done.stderr
    assert (tmp_path / ".venv" / "mine").exists()


def test_setup_without_a_python_that_fits(tmp_path):
    tools = copy_of_tools(tmp_path)
    old = program(tmp_path / "bin", "python3", "exit 1")  # what a version check would answer
    done = subprocess.run(
        [tools / "setup"],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no Python 3.10 to 3.14 found" in done.stderr


# tools/launch


def launch(tmp_path: Path, ranks: str, version: str, **variables: str) -> list[str]:
    """What tools/launch would start with an mpirun of this version, and with which variables."""
    tools = copy_of_tools(tmp_path)
    names = "OMP_NUM_THREADS OMPI_MCA_mpi_yield_when_idle PRTE_ALLOW_RUN_AS_ROOT"
    program(
        tmp_path / "bin",
        "mpirun",
        f"""if [ "$1" = --version ]; then echo "{version}"; exit; fi
printf '%s\\n' "$@"
for name in {names}; do eval "printf '%s=%s\\n' $name \\"\\$$name\\""; done""",
    )
    drop = ("OMP_", "OMPI_", "PRTE_", "SLURM_", "PBS_", "LSB_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        [tools / "launch", ranks, "--", "prog", "an argument"],
        env={**env, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_launch_with_open_mpi(tmp_path):
    lines = launch(tmp_path, "500", "mpirun (Open MPI) 5.0.11")
    assert lines[:6] == ["--oversubscribe", "--bind-to", "none", "-n", "500", "prog"]
    assert lines[6] == "an argument"
    assert "OMP_NUM_THREADS=1" in lines
    assert "OMPI_MCA_mpi_yield_when_idle=1" in lines
    assert f"PRTE_ALLOW_RUN_AS_ROOT={'1' if os.getuid() == 0 else ''}" in lines


def test_launch_keeps_what_the_caller_set(tmp_path):
    lines = launch(
        tmp_path,
        "1",
        "mpirun (Open MPI) 4.1.4",
        OMP_NUM_THREADS="3",
        OMPI_MCA_mpi_yield_when_idle="0",
        SLURM_JOB_ID="7",
    )
    assert lines[:4] == ["--bind-to", "none", "-n", "1"]  # a batch job's slots are respected
    assert "OMP_NUM_THREADS=3" in lines
    assert "OMPI_MCA_mpi_yield_when_idle=0" in lines


def test_launch_with_mpich(tmp_path):
    assert launch(tmp_path, "2", "HYDRA build details:")[:4] == ["-n", "2", "prog", "an argument"]


@pytest.mark.parametrize("arguments", [[], ["2"], ["2", "prog"], ["2", "--"]])
def test_launch_usage(arguments):
    done = subprocess.run([LAUNCH, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: tools/launch N -- COMMAND" in done.stderr


@pytest.mark.parametrize("script", ["setup", "launch"])
def test_scripts_are_executable(script):
    assert os.access(ROOT / "tools" / script, os.X_OK)


def test_every_pinned_package_is_exact():
    for lock in (ROOT / "tools" / "lock").glob("*.txt"):
        for line in lock.read_text().splitlines():
            if line and not line.startswith("#"):
                assert line.count("==") == 1 or "python_version" in line, f"{lock.name}: {line}"
