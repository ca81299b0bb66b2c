"""Finding and reading input files: where was looked, how far a file could be read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from hpctrain.errors import DataError

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""File name ending -> how to open such a file."""

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Root:
    """The folder that relative paths of a data table start from, and who chose it."""

    folder: Path
    chosen_by: str

    @classmethod
    def of(cls, configured: str) -> Root:
        """`configured` (data.root), else $HPCTRAIN_DATA, else the working directory. Local."""
        if configured:
            return cls(Path(configured).expanduser().absolute(), "data.root")
        if from_environment := os.environ.get("HPCTRAIN_DATA"):
            return cls(Path(from_environment).expanduser().absolute(), "$HPCTRAIN_DATA")
        return cls(Path.cwd(), "the working directory")

    def find(self, what: str, names: Sequence[str], *, key: str) -> Path:
        """The first of `names` that exists. Local.

        Args:
            what: For the message: "the training images".
            names: Paths relative to the root; absolute ones stay.
            key: The configuration key that names the file.

        Raises:
            DataError: none exists; lists every path looked at and what to do.
        """
        looked_at = [self.folder / name for name in names]
        for path in looked_at:
            if path.exists():
                return path
        places = "\n".join(f"  {path}" for path in looked_at)
        raise DataError(
            f"{what} not found. Looked for:\n{places}\nThe folder {self.folder} comes from "
            f"{self.chosen_by}. Set data.root or $HPCTRAIN_DATA to the folder that holds the data "
            f"set, or name the file with data.{key}."
        )


def with_endings(name: str) -> list[str]:
    """`name` as given, then with and without the endings of compressed files. Local."""
    stem, ending = os.path.splitext(name)
    plain = stem if ending in COMPRESSED else name
    return list(dict.fromkeys([name, plain, *(plain + other for other in COMPRESSED)]))


def _opener(path: Path) -> Callable[[Path, str], Any]:
    return COMPRESSED.get(path.suffix, open)


class Stream:
    """Bytes of a file, unpacked on the way, with the offset for messages. Used by one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        """Bytes read so far, counted in the unpacked data."""
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Stream:
        with self.reporting():
            self._file = _opener(self.path)(self.path, "rb")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, limit_bytes: int | None = None) -> bytes:
        """At most so many bytes (by default one piece); empty only at the end.

        Raises:
            DataError: the file is cut short or corrupt; names it and the offset.
        """
        assert self._file is not None
        with self.reporting():
            piece = self._file.read(limit_bytes or CHUNK_BYTES)
        self.offset += len(piece)
        return piece

    def fill(self, target: np.ndarray, what: str) -> None:
        """Read exactly as much as the contiguous array `target` holds.

        Raises:
            DataError: the file ends before; says how many bytes are missing.
        """
        view = target.reshape(-1).view(np.uint8)
        start, done = self.offset, 0
        while done < len(view):
            piece = self.read(min(CHUNK_BYTES, len(view) - done))
            if not piece:
                raise DataError(
                    f"{self.path}: ends at byte {self.offset}, but {what} should go on to byte "
                    f"{start + len(view)}: the file is truncated; fetch it again"
                )
            view[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)

    def chunks(self) -> Iterator[bytes]:
        """The rest of the file in pieces.

        Raises:
            DataError: as `read`.
        """
        while piece := self.read():
            yield piece

    def require_end(self, expected: str) -> None:
        """Check that nothing follows.

        Raises:
            DataError: there are bytes beyond this offset.
        """
        if self.read(1):
            raise DataError(
                f"{self.path}: goes on after byte {self.offset - 1}, where {expected} ends: its "
                "header is wrong or it is another kind of file"
            )

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Turn what decompression raises into an error with file and offset."""
        unpacked = " of the unpacked data" if self.path.suffix in COMPRESSED else ""
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
            kind = "truncated" if isinstance(error, EOFError) else "corrupt"
            raise DataError(
                f"{self.path}: {kind} after byte {self.offset}{unpacked} ({error}); fetch the "
                "file again"
            ) from error
