"""Small data files for tests, and loading on one or several pretended ranks."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.data.spec import DataSets
from hpctrain.transport.threads import RankError, run_threads

CIFAR_RECORD_BYTES = 3073


def load_on(size: int, config: Any, seed: int = 0) -> list[DataSets]:
    """What every one of `size` ranks of one node loads; raises what rank 0 raised."""
    try:
        return run_threads(size, lambda comm: config.load(comm.node(), seed))
    except RankError as error:
        raise (error.__cause__ or error) from None


def load(config: Any, seed: int = 0) -> DataSets:
    return load_on(1, config, seed)[0]


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def random_images(count: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_mnist(root: Path, n_train: int = 40, n_test: int = 12) -> dict[str, np.ndarray]:
    """A set like MNIST in root/mnist: training files .gz, held-out files plain."""
    folder = root / "mnist"
    folder.mkdir()
    arrays = {
        "train-images-idx3-ubyte": random_images(n_train, (6, 5), 1),
        "train-labels-idx1-ubyte": np.arange(n_train, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": random_images(n_test, (6, 5), 2),
        "t10k-labels-idx1-ubyte": np.arange(n_test, dtype=np.uint8) % 10,
    }
    for name, array in arrays.items():
        if name.startswith("train"):
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))
    return arrays


def cifar_records(count: int, seed: int) -> np.ndarray:
    """(count, 3073) uint8: label, then pixels."""
    records = random_images(count, (CIFAR_RECORD_BYTES,), seed)
    records[:, 0] %= 10
    return records


def write_cifar(root: Path, records_per_file: int = 7, train_files: int = 2) -> np.ndarray:
    """A folder cifar-10-batches-bin; returns the training records."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    train = [cifar_records(records_per_file, seed) for seed in range(train_files)]
    for number, records in enumerate(train, start=1):
        (folder / f"data_batch_{number}.bin").write_bytes(records.tobytes())
    (folder / "test_batch.bin").write_bytes(cifar_records(records_per_file, 99).tobytes())
    (folder / "batches.meta.txt").write_text("airplane\n")
    return np.concatenate(train)


def pack(folder: Path, archive: Path) -> None:
    """A tar archive of a folder, compressed as its name says, and the folder's end."""
    ending = archive.suffix.removeprefix(".")
    with tarfile.open(archive, f"w:{ending if ending != 'tar' else ''}") as tar:
        tar.add(folder, folder.name)
