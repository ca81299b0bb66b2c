"""CIFAR-10 in its binary version: a folder or a tar archive, also compressed.

    a file is a number of records:  1 byte label, 1024 bytes red, 1024 green, 1024 blue (32x32)

Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

import numpy as np
from pydantic import Field

from hpctrain.data.arrays import ArraySamples
from hpctrain.data.files import COMPRESSED, Root, Stream
from hpctrain.data.share import Survey, load_once
from hpctrain.data.source import Images, at_most
from hpctrain.data.spec import DataSets, Spec
from hpctrain.errors import DataError
from hpctrain.transport.communicator import Communicator

_CLASSES = 10
_SHAPE = (3, 32, 32)
_RECORD_BYTES = 1 + 3 * 32 * 32
_BLOCK_RECORDS = 1000
_TEST_FILE = "test_batch.bin"
_FOLDER = "cifar-10-batches-bin"
_ARCHIVE = "cifar-10-binary.tar"


class CifarBinary(Images):
    """[data] kind = "cifar-binary": five files of training records and one of held-out ones."""

    kind: Literal["cifar-binary"] = "cifar-binary"
    """The source."""
    path: str = ""
    """Folder of the .bin files, or the archive (.tar, .tar.gz, .tar.bz2, .tar.xz); by default the
    official names, in the root or in its folder cifar10."""
    train_files: int = Field(default=5, ge=1)
    """Number of training files: data_batch_1.bin and so on."""
    records_per_file: int = Field(default=10_000, ge=1)
    """Records in each file; another number means that the file was cut."""

    def load(self, node: Communicator, seed: int) -> DataSets:
        """Collective over the node.

        Raises:
            DataError: a file is missing, cut short, corrupt, or has a label above 9.
            ConfigError: mean and std do not have three channels.
        """
        shared = load_once(node, self._survey)
        arrays, mean, std = shared.arrays, shared.facts["mean"], shared.facts["std"]
        splits = []
        for split in ("train", "test"):
            augments = split == "train" and self.augment == "crop-flip"
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            splits.append(
                ArraySamples(images, labels, tuple(mean), tuple(std), seed if augments else None)
            )
        spec = Spec("classification", _SHAPE, "float32", _CLASSES)
        return DataSets(splits[0], splits[1], spec, windows=shared.windows)

    def _survey(self) -> Survey:
        self.check_images(*_SHAPE)
        path = Root.of(self.root).find(
            "CIFAR-10 (binary version)", [self.path] if self.path else _usual_places(), key="path"
        )
        n_train = at_most(self.train_files * self.records_per_file, self.limit_train)
        n_test = at_most(self.records_per_file, self.limit_test)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
        for split, count in (("train", n_train), ("test", n_test)):
            shapes[f"{split}_images"] = ((count, *_SHAPE), np.uint8)
            shapes[f"{split}_labels"] = ((count,), np.uint8)

        def fill(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
            if path.is_dir():
                self._fill_from_folder(path, arrays)
            else:
                self._fill_from_archive(path, arrays)
            return self.scale(arrays["train_images"])

        return Survey(shapes, fill)

    def _places(self) -> dict[str, tuple[str, int]]:
        """File name -> (split, number of its first record in that split)."""
        train = {
            f"data_batch_{number + 1}.bin": ("train", number * self.records_per_file)
            for number in range(self.train_files)
        }
        return train | {_TEST_FILE: ("test", 0)}

    def _fill_from_folder(self, folder: Path, arrays: dict[str, np.ndarray]) -> None:
        for name, place in self._places().items():
            path = Root(folder, "data.path").find(name, [name], key="path")
            self._check_size(str(path), path.stat().st_size)
            with Stream(path) as stream:
                self._read(stream, str(path), place, arrays)

    def _fill_from_archive(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        missing = self._places()
        with Stream(path) as stream, stream.reporting():
            try:
                # One pass, nothing unpacked to disk: the archive's order decides.
                archive = tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|")  # noqa: SIM115
                for member in archive:
                    name = PurePosixPath(member.name).name
                    if not member.isfile() or name not in missing:
                        continue
                    label = f"{path} ({member.name})"
                    self._check_size(label, member.size)
                    content = archive.extractfile(member)
                    assert content is not None
                    self._read(content, label, missing.pop(name), arrays)
                    if not missing:
                        return
            except tarfile.TarError as error:
                raise DataError(
                    f"{path}: not a whole tar archive ({error}; read up to byte {stream.offset}); "
                    "fetch it again"
                ) from error
        raise DataError(f"{path}: the archive lacks {', '.join(missing)}")

    def _check_size(self, label: str, nbytes: int) -> None:
        expected = self.records_per_file * _RECORD_BYTES
        if nbytes != expected:
            records, rest = divmod(nbytes, _RECORD_BYTES)
            raise DataError(
                f"{label}: has {nbytes} bytes = {records} records and {rest} bytes; "
                f"{self.records_per_file} records of {_RECORD_BYTES} bytes are {expected}. Fetch "
                "it again, or set data.records_per_file"
            )

    def _read(
        self, file: Any, label: str, place: tuple[str, int], arrays: dict[str, np.ndarray]
    ) -> None:
        """Records of one file into their rows, as far as those are kept."""
        split, first = place
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        kept = max(0, min(self.records_per_file, len(labels) - first))
        for done in range(0, kept, _BLOCK_RECORDS):
            count = min(_BLOCK_RECORDS, kept - done)
            block = bytearray()
            while len(block) < count * _RECORD_BYTES:
                piece = file.read(count * _RECORD_BYTES - len(block))
                if not piece:
                    at = done * _RECORD_BYTES + len(block)
                    raise DataError(f"{label}: ends at byte {at}, in record {at // _RECORD_BYTES}")
                block += piece
            records = np.frombuffer(block, np.uint8).reshape(count, _RECORD_BYTES)
            bad = np.flatnonzero(records[:, 0] >= _CLASSES)
            if len(bad):
                number = done + int(bad[0])
                raise DataError(
                    f"{label}: label {records[bad[0], 0]} of record {number} (byte "
                    f"{number * _RECORD_BYTES}) is not in 0..{_CLASSES - 1}; fetch it again"
                )
            rows = slice(first + done, first + done + count)
            labels[rows] = records[:, 0]
            images[rows] = records[:, 1:].reshape(count, *_SHAPE)


def _usual_places() -> list[str]:
    names = [_FOLDER, *(_ARCHIVE + ending for ending in ("", *COMPRESSED))]
    return names + [f"cifar10/{name}" for name in names]
