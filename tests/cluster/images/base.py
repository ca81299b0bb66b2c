"""A base image made here with debootstrap, for a machine that reaches no image registry.

    python -m tests.cluster.images.base OUT.tar

Needs root (debootstrap makes device nodes). The result is a docker-archive: one layer without
compression, a configuration and a manifest, which Apptainer reads with `Bootstrap: docker-archive`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.cluster.images.install import InstallError, mirror, run

RELEASE = "bookworm"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
LEFT_OUT = ("dev/", "proc/", "sys/", "var/cache/apt/", "var/lib/apt/lists/", "var/log/")
"""What no image needs of them; the folders themselves stay."""


def make_base(archive: Path) -> None:
    """Write a minimal Debian as a docker-archive, under its final name only when complete.

    Raises:
        InstallError: not root, or debootstrap failed.
    """
    if os.geteuid() != 0:
        raise InstallError(f"making {archive} needs root (debootstrap makes device nodes)")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hpctrain-base-") as folder:
        tree = Path(folder, "tree")
        run(["debootstrap", "--variant=minbase", RELEASE, tree, mirror()])
        layer = Path(folder, "layer.tar")
        _pack(tree, layer)
        shutil.rmtree(tree)
        unfinished = archive.with_name(archive.name + ".part")
        _write_archive(layer, unfinished)
        os.replace(unfinished, archive)


def _pack(tree: Path, layer: Path) -> None:
    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if member.name.startswith(LEFT_OUT) or member.isdev() else member

    with tarfile.open(layer, "w") as tar:
        for path in sorted(tree.iterdir()):
            tar.add(path, arcname=path.name, filter=wanted)


def _write_archive(layer: Path, archive: Path) -> None:
    with layer.open("rb") as source:
        total = hashlib.sha256()
        for block in iter(lambda: source.read(1 << 20), b""):
            total.update(block)
    configuration = {
        "architecture": ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{total.hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": None, "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as tar:
        tar.add(layer, arcname="layer.tar")
        for name, content in (("config.json", configuration), ("manifest.json", manifest)):
            text = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(text)
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(text))


if __name__ == "__main__":
    try:
        make_base(Path(sys.argv[1]))
    except InstallError as error:
        sys.exit(f"images: {error}")
