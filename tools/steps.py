"""What the set-up scripts share: commands with a log, one lock, failures that name a remedy.

Standard library only, and nothing newer than Python 3.10.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent


class SetupError(Exception):
    """Set-up cannot go on: what is wrong, and what to do about it."""


def say(text: str) -> None:
    """Print one line of progress at once."""
    print(text, flush=True)


def digest(*parts: str | bytes | Path) -> str:
    """Short hash of texts and of the contents of files."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        total.update(data.encode() if isinstance(data, str) else data)
        total.update(b"\0")
    return total.hexdigest()[:16]


def clean_environment(bin_folder: Path) -> dict[str, str]:
    """This process's environment, without what would leak packages or settings into pip and make.

    `bin_folder` comes first on PATH. A module system's PYTHONPATH would make pip believe that its
    packages are installed; MAKEFLAGS of an outer make would build Horovod on one core.
    """
    drop = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIREMENT"}
    drop |= {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    env = {name: value for name, value in os.environ.items() if name not in drop}
    if env.get("MPI4PY_MPIABI") == "":
        del env["MPI4PY_MPIABI"]  # set but empty, it breaks `import mpi4py.MPI`
    env["PATH"] = os.pathsep.join([str(bin_folder), env.get("PATH", os.defpath)])
    env["PYTHONNOUSERSITE"] = "1"
    env["PIP_USER"] = "0"
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    return env


REMEDIES = (
    (
        ("No space left on device", "Disk quota exceeded"),
        "The disk or the quota is full: set-up needs about 3 GB here and 2 GB for its caches.",
    ),
    (
        (
            "Failed to establish a new connection",
            "Temporary failure in name resolution",
            "Connection refused",
            "ConnectTimeoutError",
            "ProxyError",
            "Network is unreachable",
            "No matching distribution found",
        ),
        "pip reached no package index that has this. On a machine without network, point pip at a\n"
        "mirror or a folder of wheels (PIP_INDEX_URL, PIP_FIND_LINKS) or at a proxy (HTTPS_PROXY).",
    ),
    (
        ("Python.h: No such file", "Could NOT find Python"),
        "The headers of this Python are missing: install its development package (python3-dev).",
    ),
)


def remedy(log_text: str) -> str:
    """Advice for a failed command, from what it printed; empty when nothing is known."""
    for signs, advice in REMEDIES:
        if any(sign in log_text for sign in signs):
            return advice
    return ""


class Commands:
    """Runs commands one after the other, their output in one log file."""

    def __init__(self, log: Path, env: Mapping[str, str], keep_open: Sequence[int] = ()) -> None:
        self.log = log
        self.env = dict(env)
        self.keep_open = keep_open

    def run(
        self,
        what: str,
        command: Sequence[str | Path],
        *,
        limit_s: float | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Run one command, with `extra` added to the environment.

        Raises:
            SetupError: it failed or took too long; with the end of its output and, where known,
                a remedy.
        """
        with self.log.open("ab") as sink:
            sink.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            sink.flush()
            start = sink.tell()
            try:
                code = self._wait(command, {**self.env, **(extra or {})}, sink.fileno(), limit_s)
                ended = f"failed with code {code}"
            except subprocess.TimeoutExpired:
                code, ended = -1, f"was not done after {limit_s:.0f} s"
        if code == 0:
            return
        with self.log.open("rb") as source:
            source.seek(start)
            output = source.read().decode(errors="replace")
        tail = "\n".join("  | " + line for line in output.splitlines()[-25:])
        advice = remedy(output)
        raise SetupError(
            f"{what} {ended}:\n{tail}\n"
            + (f"{advice}\n" if advice else "")
            + f"All of its output is in {self.log}. Nothing is lost: run the same command again."
        )

    def talk(self, command: Sequence[str | Path]) -> int:
        """Run a command that reports to the person itself; its exit code."""
        return self._wait(command, self.env, None, None)

    def _wait(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str],
        sink: int | None,
        limit_s: float | None,
    ) -> int:
        # The child keeps the lock's descriptor: if this process is killed outright, a second
        # set-up still waits until the orphan is gone. Its own process group, so that an
        # interruption ends compilers too.
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env=env,
            pass_fds=self.keep_open,
            start_new_session=True,
        )
        try:
            return child.wait(limit_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
                child.wait()
            raise


def ask(command: Sequence[str | Path], env: Mapping[str, str]) -> str | None:
    """What a command prints, stripped; None when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        env=dict(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else None


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[list[int]]:
    """Hold a lock that ends with the process; yields the descriptors children must inherit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another {what} is at work: waiting for it (lock: {path})")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            say(f"note: {path.parent} is on a file system without locks; run one {what} at a time")
        yield [descriptor]
    finally:
        os.close(descriptor)


def end_on_sigterm() -> None:
    """Turn SIGTERM and SIGHUP into an exception, so that children and half-made files go too."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)


def check_compiler(env: Mapping[str, str]) -> None:
    """Compile a few lines of C++17.

    Raises:
        SetupError: there is no compiler, or it is too old.
    """
    names = [env["CXX"]] if env.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name, path=env["PATH"]))), None)
    advice = (
        "Horovod is compiled from source and needs one: install g++ (package g++ or gcc-c++), or\n"
        "load the site's compiler module (for example: module load gcc), or name one:\n"
        "make setup CXX=/path/to/g++"
    )
    if found is None:
        raise SetupError(f"no C++ compiler found (tried: {', '.join(names)}).\n{advice}")
    with tempfile.TemporaryDirectory(prefix="hpctrain-setup-") as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <optional>\nint main() { return *std::optional<int>(0); }\n")
        built = subprocess.run(
            [found, "-std=c++17", str(source), "-o", str(source.with_suffix(""))],
            env=dict(env),
            capture_output=True,
            text=True,
            check=False,
        )
    if built.returncode != 0:
        raise SetupError(f"{found} does not compile C++17:\n{built.stderr.strip()}\n{advice}")


class Clock:
    """Seconds since it was made, for progress lines."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __str__(self) -> str:
        return f"{time.monotonic() - self._start:.0f} s"
