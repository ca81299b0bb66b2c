"""Images and labels in IDX files, plain or compressed: MNIST, Fashion-MNIST, EMNIST and their kind.

    bytes 0-3   0, 0, 8 (uint8), number of dimensions
    then        one big-endian 32-bit size per dimension, then the values

Source of the format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from hpctrain.data.arrays import ArraySamples
from hpctrain.data.files import Root, Stream, with_endings
from hpctrain.data.share import Survey, load_once
from hpctrain.data.source import Images, at_most
from hpctrain.data.spec import DataSets, Spec
from hpctrain.errors import DataError
from hpctrain.transport.communicator import Communicator

_UINT8 = 0x08
_SPLITS = ("train", "test")


class Idx(Images):
    """[data] kind = "idx": four files; each may also be there as .gz, .bz2 or .xz."""

    kind: Literal["idx"] = "idx"
    """The source."""
    folder: str = "mnist"
    """Folder of the files, below the root."""
    train_images: str = "train-images-idx3-ubyte"
    """File of the training images: (n, height, width) or (n, channels, height, width) uint8."""
    train_labels: str = "train-labels-idx1-ubyte"
    """File of the training labels: (n,) uint8."""
    test_images: str = "t10k-images-idx3-ubyte"
    """File of the held-out images."""
    test_labels: str = "t10k-labels-idx1-ubyte"
    """File of the held-out labels."""
    classes: int = Field(default=10, ge=2, le=256)
    """Number of classes; labels are 0 to classes - 1."""

    def load(self, node: Communicator, seed: int) -> DataSets:
        """Collective over the node.

        Raises:
            DataError: a file is missing, cut short, corrupt or not what it should be.
            ConfigError: mean, std or augment do not fit the images.
        """
        shared = load_once(node, self._survey)
        arrays, mean, std = shared.arrays, shared.facts["mean"], shared.facts["std"]
        splits = []
        for split in _SPLITS:
            augments = split == "train" and self.augment == "crop-flip"
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            splits.append(
                ArraySamples(images, labels, tuple(mean), tuple(std), seed if augments else None)
            )
        shape = arrays["train_images"].shape[1:]
        spec = Spec("classification", shape, "float32", self.classes)
        return DataSets(splits[0], splits[1], spec, windows=shared.windows)

    def _survey(self) -> Survey:
        root = Root.of(self.root)
        paths: dict[str, Path] = {}
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
        counts: dict[str, int] = {}
        for split, limit in (("train", self.limit_train), ("test", self.limit_test)):
            for part in ("images", "labels"):
                name = f"{split}_{part}"
                files = with_endings(str(Path(self.folder) / getattr(self, name)))
                paths[name] = root.find(f"the {split} {part}", files, key=name)
            images = _shape_of(paths[f"{split}_images"], (3, 4))
            labels = _shape_of(paths[f"{split}_labels"], (1,))
            if images[0] != labels[0]:
                raise DataError(
                    f"{paths[f'{split}_images']} has {images[0]} images, "
                    f"{paths[f'{split}_labels']} {labels[0]} labels; they are not of one set"
                )
            image = (1, *images[1:]) if len(images) == 3 else images[1:]
            counts[split] = images[0]
            kept = at_most(images[0], limit)
            shapes[f"{split}_images"] = ((kept, *image), np.uint8)
            shapes[f"{split}_labels"] = ((kept,), np.uint8)
        train, test = (shapes[f"{split}_images"][0][1:] for split in _SPLITS)
        if train != test:
            raise DataError(
                f"{paths['train_images']} has images of shape {train}, {paths['test_images']} of "
                f"{test}; training and held-out images must have one shape"
            )
        self.check_images(*train)

        def fill(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
            for name, path in paths.items():
                _read(path, arrays[name], whole=counts[name.split("_")[0]])
            for split in _SPLITS:
                self._check_labels(paths[f"{split}_labels"], arrays[f"{split}_labels"])
            return self.scale(arrays["train_images"])

        return Survey(shapes, fill)

    def _check_labels(self, path: Path, labels: np.ndarray) -> None:
        bad = np.flatnonzero(labels >= self.classes)
        if len(bad):
            raise DataError(
                f"{path}: label {labels[bad[0]]} of record {bad[0]} (byte {8 + bad[0]}) is not in "
                f"0..{self.classes - 1}; set data.classes, or fetch the file again"
            )


def _header(stream: Stream, dimensions: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes that the file states; leaves the stream at the first value."""
    magic = np.empty(4, np.uint8)
    stream.fill(magic, "the magic number of an IDX file")
    if magic[0] or magic[1] or magic[2] != _UINT8 or magic[3] not in dimensions:
        raise DataError(
            f"{stream.path}: starts with bytes {magic.tobytes().hex(' ')}; an IDX file of uint8 "
            f"with {' or '.join(map(str, dimensions))} dimension(s) starts with "
            f"{' or '.join(f'00 00 08 {n:02x}' for n in dimensions)}"
        )
    sizes = np.empty(int(magic[3]), ">u4")
    stream.fill(sizes, "the sizes in the header")
    shape = tuple(int(size) for size in sizes)
    if 0 in shape:
        raise DataError(f"{stream.path}: its header states a shape of {shape}; it holds nothing")
    return shape


def _shape_of(path: Path, dimensions: tuple[int, ...]) -> tuple[int, ...]:
    with Stream(path) as stream:
        shape = _header(stream, dimensions)
    plain_size = None if path.suffix in (".gz", ".bz2", ".xz") else path.stat().st_size
    expected = 4 + 4 * len(shape) + int(np.prod(shape, dtype=np.int64))
    if plain_size is not None and plain_size != expected:
        raise DataError(
            f"{path}: its header (shape {shape}) asks for {expected} bytes, the file has "
            f"{plain_size}: {'truncated' if plain_size < expected else 'too long'}; fetch it again"
        )
    return shape


def _read(path: Path, target: np.ndarray, whole: int) -> None:
    """Read the first rows into `target`; the file must end where its `whole` rows do."""
    with Stream(path) as stream:
        _header(stream, (1, 3, 4))
        stream.fill(target, f"record {len(target) - 1}")
        if len(target) == whole:
            stream.require_end(f"its last record ({whole - 1})")
