"""Build the images of containers/ on this machine, each once for everything that goes into it.

    python -m tests.cluster.images.build openmpi        prints the path of the image

The base is made here (base.py) and the build runs as an ordinary user (account.py). Everything is
kept in that user's ~/.cache/hpctrain/images (XDG_CACHE_HOME is respected): the base, Horovod's
wheels, the newest images with a log and a JSON of what went into each.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpctrain.launch.container import build_words
from tests.cluster.images.account import as_builder, builder
from tests.cluster.images.base import RELEASE, make_base
from tests.cluster.images.install import InstallError, install, run

ROOT = Path(__file__).resolve().parents[3]
DEFINITIONS = {"openmpi": "hpctrain.def", "mpich": "hpctrain-mpich.def"}
KEPT = 2
"""Images kept of each family, the newest."""


@dataclass(frozen=True)
class Image:
    """An image that is there, and what making it took."""

    path: Path
    size_mb: float
    build_s: float
    reused: bool


def image(mpi: str) -> Image:
    """Build the image of an MPI family, or take it from the cache.

    Raises:
        InstallError: the build failed, with the end of its log.
    """
    version = install()
    cache = cache_folder()
    with _locked(cache / "lock"):
        base = cache / f"{RELEASE}.tar"
        if not base.exists():
            make_base(base)
        source = cache / "source"
        copied = _copy_source(DEFINITIONS[mpi], source)
        wheels = cache / "wheels"
        wheels.mkdir(exist_ok=True)
        _give(wheels)
        definition = f"containers/{DEFINITIONS[mpi]}"
        arguments, binds = _arguments(base, wheels)
        inputs = {
            "apptainer": version,
            "arguments": arguments,
            "base": _digest(base),
            "files": {name: _digest(source / name) for name in copied},
            "wheels": _listing(binds),
        }
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        path = cache / f"hpctrain-{mpi}-{key}.sif"
        record = path.with_suffix(".json")
        try:
            if path.exists() and record.exists():
                os.utime(path)
                build_s = json.loads(record.read_text())["build_s"]
                return Image(path, path.stat().st_size / 1e6, build_s, True)
            words = build_words(
                definition, str(path.with_suffix(".part")), arguments=arguments, binds=binds
            )
            build_s = _build(words, source, path)
        finally:
            shutil.rmtree(source)
        size_mb = path.stat().st_size / 1e6
        record.write_text(json.dumps({"build_s": build_s, "size_mb": size_mb, **inputs}, indent=2))
        _forget_old(cache, mpi)
        return Image(path, size_mb, build_s, False)


def cache_folder() -> Path:
    """Where bases, wheels and images are kept; belongs to the user who builds."""
    base = os.environ.get("XDG_CACHE_HOME") or Path(builder().pw_dir, ".cache")
    folder = Path(base, "hpctrain", "images")
    if not folder.exists():
        subprocess.run(as_builder(["mkdir", "-p", folder]), check=True)
    return folder


def _arguments(base: Path, wheels: Path) -> tuple[list[str], list[str]]:
    """Build arguments and binds of this machine: base, certificates, wheels of torch."""
    arguments = ["bootstrap=docker-archive", f"build_from={base}", f"from={base}"]
    binds = [f"{wheels}:/srv"]
    arguments.append(f"cache=/srv/{_digest(base)[:16]}")
    bundle = os.environ.get("PIP_CERT") or _pip("global.cert") or ssl.get_default_verify_paths()[0]
    if bundle:
        binds.append(f"{Path(bundle).parent}:/media")
        arguments.append(f"certificates=/media/{Path(bundle).name}")
    found = (os.environ.get("PIP_FIND_LINKS") or _pip("global.find-links")).split()
    if found:
        binds.append(f"{found[0]}:/mnt")
        arguments += ["wheels=/mnt"]
    return arguments, binds


def _pip(key: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", key],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def _copy_source(definition: str, target: Path) -> list[str]:
    """A copy of what the definition takes from the checkout, itself included; relative names."""
    shutil.rmtree(target, ignore_errors=True)
    names = [f"containers/{definition}", *copied_into_image(ROOT / "containers" / definition)]
    for name in names:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())


def copied_into_image(definition: Path) -> list[str]:
    """Sources of the first %files section, relative to the checkout."""
    lines = iter(definition.read_text().splitlines())
    names = []
    for line in lines:
        if line == "%files":
            for entry in lines:
                if not entry.startswith(" "):
                    return names
                names.append(entry.split()[0])
    return names


def _build(words: list[str], source: Path, path: Path) -> float:
    """Run the build in `source`, move the image to its final name; seconds it took."""
    log = path.with_suffix(".log")
    unfinished = path.with_suffix(".part")
    # What a killed build left goes first: its image, and its scratch folder, here on this disk.
    for leftover in path.parent.glob("*.part"):
        leftover.unlink()
    scratch = path.parent / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(exist_ok=True)
    _give(scratch)
    settings = [f"APPTAINER_TMPDIR={scratch}", f"APPTAINER_CACHEDIR={scratch / 'cache'}"]
    start = time.monotonic()
    try:
        with log.open("w") as sink:
            command = as_builder(["env", *settings, *words])
            sink.write(f"$ {' '.join(words)}\n")
            sink.flush()
            code = subprocess.call(
                command, cwd=source, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
    finally:
        run(as_builder(["rm", "-rf", scratch / "cache"]))
        shutil.rmtree(scratch, ignore_errors=True)
    if code != 0:
        end = "\n".join("  | " + line for line in log.read_text().splitlines()[-30:])
        raise InstallError(f"the build of {path.name} ended with {code}:\n{end}\nAll of it: {log}")
    os.replace(unfinished, path)
    return time.monotonic() - start


def _forget_old(cache: Path, mpi: str) -> None:
    images = sorted(cache.glob(f"hpctrain-{mpi}-*.sif"), key=lambda path: path.stat().st_mtime)
    for path in images[:-KEPT]:
        for ending in (".sif", ".json", ".log"):
            path.with_suffix(ending).unlink(missing_ok=True)


def _give(folder: Path) -> None:
    """Let the builder write here; also when this is root."""
    user = builder()
    if os.geteuid() == 0:
        os.chown(folder, user.pw_uid, user.pw_gid)


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as source:
        for block in iter(lambda: source.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


def _listing(binds: list[str]) -> list[str]:
    """Names and sizes of the wheels pip may take."""
    folders = [Path(bind.split(":")[0]) for bind in binds if bind.endswith(":/mnt")]
    wheels = [path for folder in folders for path in sorted(folder.glob("*.whl"))]
    return [f"{path.name} {path.stat().st_size}" for path in wheels]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One build at a time on this machine."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        built = image(sys.argv[1])
    except InstallError as error:
        sys.exit(f"images: {error}")
    how = "from the cache, built in" if built.reused else "built in"
    print(f"images: {built.size_mb:.0f} MB, {how} {built.build_s:.0f} s", file=sys.stderr)
    print(built.path)
