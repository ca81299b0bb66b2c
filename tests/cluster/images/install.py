"""Install Apptainer on a Debian machine that has no package of it. Needs root.

    python -m tests.cluster.images.install

Debian packages Apptainer in unstable only, built for a newer C library. Both packages are fetched
from the machine's own mirror through a private list of sources (what apt itself uses stays as it
is); the newer libraries go into a folder of their own and Apptainer's programs are pointed there.
Does nothing where Apptainer already works.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SUITE = "unstable"
NEEDED = ("uidmap", "squashfs-tools", "squashfuse", "fuse3", "patchelf", "debootstrap")
PLACES = ("etc/apptainer", "var/lib/apptainer", "usr/share/apptainer")
FUSE = Path("/dev/fuse")
CAPABILITIES = ("root default capabilities = full", "root default capabilities = no")


class InstallError(Exception):
    """Apptainer cannot be installed: why, and what to do."""


def run(command: Sequence[str | Path], *, cwd: Path | None = None) -> str:
    """Run a command; its output.

    Raises:
        InstallError: it failed; with the end of what it printed.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise InstallError(f"`{' '.join(words)}` ended with {done.returncode}:\n{end}")
    return done.stdout


def version() -> str | None:
    """What the installed Apptainer says of itself; None when there is none that starts."""
    try:
        return run(["apptainer", "--version"]).strip()
    except (InstallError, OSError):
        return None


def mirror() -> str:
    """Where this machine's own release comes from, as apt reads its sources.

    Raises:
        InstallError: apt knows no source of this release.
    """
    release = run(["sh", "-c", '. /etc/os-release; echo "$ID $VERSION_CODENAME"']).split()
    if release[0] != "debian" or len(release) != 2:
        raise InstallError(
            "this is no Debian release. Install Apptainer as its own page describes for this "
            "system, so that `apptainer --version` works."
        )
    wanted = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"]
    for line in run([*wanted, "Created-By: Packages"]).splitlines():
        address, suite = line.split()
        if suite == release[1]:
            return address
    raise InstallError(f"apt has no source of {release[1]}: see /etc/apt/sources.list.d")


def download(folder: Path) -> dict[str, Path]:
    """Fetch the two packages and unpack each into a folder of its own."""
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources = folder / "sources.list"
    sources.write_text(f"deb [signed-by={keyring}] {mirror()} {SUITE} main\n")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-q"]
    for name, value in options.items():
        apt += ["-o", f"{name}={value}"]
    run([*apt, "update"])
    found = {}
    for name in ("apptainer", "libc6"):
        packages = folder / f"{name}.packages"
        packages.mkdir()
        run([*apt, "download", f"{name}/{SUITE}"], cwd=packages)
        (package,) = packages.glob("*.deb")
        found[name] = folder / name
        run(["dpkg-deb", "--extract", package, found[name]])
    return found


def place(apptainer: Path, libc: Path) -> None:
    """Put the files where their package wants them, the C library beside, and join the two."""
    (starter,) = apptainer.glob("usr/lib/*/apptainer/bin/starter")
    home = Path("/", starter.relative_to(apptainer)).parents[1]
    multiarch = home.parent.name
    libraries = home / "libc"
    shutil.rmtree(home, ignore_errors=True)
    libraries.mkdir(parents=True)
    for library in libc.glob(f"usr/lib/{multiarch}/*.so*"):
        shutil.copy2(library, libraries)
    shutil.copytree(starter.parents[1], home, dirs_exist_ok=True)
    for name in PLACES:
        if (apptainer / name).exists():
            shutil.copytree(apptainer / name, Path("/", name), symlinks=True, dirs_exist_ok=True)
    search = f"{libraries}:/lib/{multiarch}:/usr/lib/{multiarch}"
    for source, target in (
        (starter, home / "bin/starter"),
        (apptainer / "usr/bin/apptainer", Path("/usr/bin/apptainer")),
    ):
        loader = Path(run(["patchelf", "--print-interpreter", source]).strip()).name
        run(["patchelf", "--set-interpreter", libraries / loader, "--set-rpath", search, source])
        fresh = target.with_name(target.name + ".new")
        shutil.copy2(source, fresh)
        os.replace(fresh, target)
    # By default a container of root asks for every capability; a sandbox's root lacks some.
    settings = Path("/etc/apptainer/apptainer.conf")
    text = settings.read_text().replace(*CAPABILITIES)
    settings.write_text(text)


def missing_packages() -> list[str]:
    """Those of `NEEDED` that are not installed."""
    missing = []
    for name in NEEDED:
        status = subprocess.run(
            ["dpkg-query", "-W", "-f", "${db:Status-Status}", name],
            capture_output=True,
            text=True,
            check=False,
        )
        if status.stdout != "installed":
            missing.append(name)
    return missing


def install() -> str:
    """Bring Apptainer and what it needs onto this machine; its version.

    Raises:
        InstallError: something is missing that this cannot bring.
    """
    missing = missing_packages() if shutil.which("dpkg-query") else []
    if not missing and FUSE.exists() and os.access(FUSE, os.W_OK) and (found := version()):
        _open_fuse()
        return found
    if os.geteuid() != 0:
        raise InstallError(
            "installing Apptainer needs root: sudo python -m tests.cluster.images.install"
        )
    if missing:
        run(["apt-get", "-q", "update"])
        run(["apt-get", "-q", "install", "-y", "--no-install-recommends", *missing])
    if version() is None:
        with tempfile.TemporaryDirectory(prefix="hpctrain-apptainer-") as folder:
            found_packages = download(Path(folder))
            place(found_packages["apptainer"], found_packages["libc6"])
    _open_fuse()
    installed = version()
    if installed is None:
        raise InstallError("Apptainer is in place but does not start: run `apptainer --version`")
    return installed


def _open_fuse() -> None:
    """Let ordinary users mount images, as a desktop's udev rules do."""
    if not FUSE.exists():
        raise InstallError("there is no /dev/fuse: load the kernel's module (modprobe fuse)")
    if os.geteuid() == 0 and FUSE.stat().st_mode & 0o666 != 0o666:
        FUSE.chmod(0o666)


if __name__ == "__main__":
    try:
        print(install())
    except InstallError as error:
        sys.exit(f"images: {error}")
