"""Files that survive a kill or a power cut: written aside, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: readers see the old content or the new. Local.

    Raises:
        OSError: the disk is full, the folder is missing or not writable; the old content stays.
    """
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk. Local."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk. Local."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (FUSE, older SMB) cannot flush a folder and keep names in order anyway.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def error_number(error: BaseException) -> int:
    """The operating system's number of an error, 0 if it has none. Local.

    safetensors raises its own exception whose text carries the number.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else 0


def reason(error: BaseException) -> str:
    """What went wrong in the operating system's words, e.g. "No space left on device". Local."""
    number = error_number(error)
    return os.strerror(number) if number else f"{type(error).__name__}: {error}"
