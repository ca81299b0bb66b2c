"""Which MPI to build and run with: the site's own when it is complete, else the one in .venv."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from steps import SetupError, ask

LAUNCHERS = ("mpirun", "mpiexec")
COMPILERS = ("mpicxx", "mpic++", "mpiCC")

PROBE = """#include <mpi.h>
#include <cstdio>
int main() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length;
  MPI_Get_library_version(text, &length);
  std::puts(text);
}
"""


@dataclass(frozen=True)
class SiteMpi:
    """An MPI found on PATH."""

    mpirun: Path
    mpicxx: Path

    def identity(self) -> str:
        """Changes when another MPI is loaded or this one is upgraded in place."""
        parts = []
        for path in (self.mpirun, self.mpicxx):
            real = path.resolve()
            status = real.stat()
            parts.append(f"{path} {real} {status.st_size} {status.st_mtime_ns}")
        return "\n".join(parts)


def without(folder: Path, search_path: str) -> str:
    """A PATH less everything inside `folder` (an activated .venv is not the site)."""
    inside = folder.resolve()
    kept = [
        entry
        for entry in search_path.split(os.pathsep)
        if entry and not Path(entry).resolve().is_relative_to(inside)
    ]
    return os.pathsep.join(kept)


def find(venv: Path, search_path: str) -> tuple[SiteMpi | None, str]:
    """The site's MPI or None, and a note for the person who waits (empty if there is none).

    Raises:
        SetupError: there is an MPI compiler but nothing to launch with.
    """
    path = without(venv, search_path)
    mpirun = next((found for name in LAUNCHERS if (found := shutil.which(name, path=path))), None)
    mpicxx = next((found for name in COMPILERS if (found := shutil.which(name, path=path))), None)
    if mpirun and mpicxx:
        return SiteMpi(Path(mpirun), Path(mpicxx)), ""
    if mpicxx:
        raise SetupError(
            f"{mpicxx} is on PATH but neither mpirun nor mpiexec is: half an MPI.\n"
            "Load the module or install the package that brings the launcher of the same MPI; or\n"
            "take the compiler off PATH (module unload), and set-up brings an Open MPI of its own."
        )
    if mpirun:
        return None, (
            f"note: {mpirun} has no mpicxx beside it (on Debian: package libopenmpi-dev or\n"
            "      libmpich-dev), so Horovod cannot be built for it; using an own Open MPI in .venv"
        )
    return None, ""


def library_version(text: str) -> str:
    """The first line of MPI_Get_library_version, less where and by whom it was packaged."""
    first = text.strip().splitlines()[0] if text.strip() else ""
    return " ".join(first.split(",")[0].split())


def version_of_compiler(mpicxx: Path | str, env: Mapping[str, str]) -> str:
    """Version of the library that `mpicxx` links.

    Raises:
        SetupError: it does not compile, or what it compiles does not start.
    """
    with tempfile.TemporaryDirectory(prefix="hpctrain-setup-") as folder:
        source = Path(folder, "probe.cpp")
        program = source.with_suffix("")
        source.write_text(PROBE)
        for command in ([str(mpicxx), str(source), "-o", str(program)], [str(program)]):
            done = subprocess.run(
                command, env=dict(env), capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise SetupError(
                    f"{mpicxx} is on PATH but does not work: `{' '.join(command)}` ended with "
                    f"{done.returncode}:\n{(done.stderr or done.stdout).strip()}\n"
                    "Repair that MPI, or load another one, or take it off PATH."
                )
    return library_version(done.stdout)


def version_of_mpi4py(python: Path | str, env: Mapping[str, str]) -> str:
    """Version of the library that mpi4py of `python` loads; empty when it loads none."""
    code = (
        "import mpi4py; mpi4py.rc.initialize = False\n"
        "from mpi4py import MPI; print(MPI.Get_library_version())"
    )
    return library_version(ask([python, "-c", code], env) or "")
