"""Which file system a folder lives on, by /proc/self/mounts."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hpctrain.doctor.facts import Space

SHARED = frozenset(
    ("lustre", "gpfs", "beegfs", "ceph", "panfs", "pvfs2", "orangefs", "wekafs", "afs", "cvmfs")
    + ("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "fuse.ceph", "fuse.glusterfs")
)
"""Types that are served to several nodes."""
IN_MEMORY = frozenset(("tmpfs", "ramfs", "devtmpfs"))


def type_of(folder: Path, mounts: str) -> str | None:
    """The type of the file system that holds a folder, None if the table does not say. Local.

    Args:
        folder: An absolute path without symbolic links.
        mounts: Text of /proc/self/mounts; a later line hides an earlier one.
    """
    best, found = -1, None
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[1])
        inside = folder == Path(point) or Path(point) in folder.parents
        if inside and len(point) >= best:
            best, found = len(point), fields[2]
    return found


def space(folder: Path) -> Space:
    """Type and free space of a folder's file system. Local.

    Raises:
        OSError: the folder does not exist.
    """
    folder = folder.resolve(strict=True)
    try:
        type_ = type_of(folder, Path("/proc/self/mounts").read_text())
    except OSError:
        type_ = None
    numbers = os.statvfs(folder)
    return Space(
        folder=str(folder),
        type=type_,
        free_bytes=numbers.f_bavail * numbers.f_frsize,
        total_bytes=numbers.f_blocks * numbers.f_frsize,
        writable=os.access(folder, os.W_OK),
    )
