from __future__ import annotations

import numpy as np
import pytest
from data_files import CIFAR_RECORD_BYTES, load, pack, write_cifar

from hpctrain.data import CifarBinary
from hpctrain.data.spec import Spec
from hpctrain.errors import DataError

SMALL = {"train_files": 2, "records_per_file": 7}


@pytest.fixture
def train(tmp_path) -> np.ndarray:
    """A small set in tmp_path; its training records."""
    return write_cifar(tmp_path)


@pytest.mark.parametrize("ending", ["", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
@pytest.mark.parametrize("below", ["", "cifar10"])
def test_folder_and_archives(tmp_path, train, ending, below):
    folder = tmp_path / "cifar-10-batches-bin"
    (tmp_path / below).mkdir(exist_ok=True)
    if ending:
        pack(folder, tmp_path / below / f"cifar-10-binary{ending}")
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    else:
        folder.rename(tmp_path / below / folder.name)
    data = load(CifarBinary(root=str(tmp_path), **SMALL))
    assert data.spec == Spec("classification", (3, 32, 32), "float32", 10)
    assert (len(data.train), len(data.test)) == (14, 7)
    images, labels = data.train.batch(np.arange(14), 0)
    assert labels.tolist() == train[:, 0].tolist()
    pixels = train[:, 1:].reshape(14, 3, 32, 32).astype(np.float64)
    mean, std = pixels.mean((0, 2, 3), keepdims=True), pixels.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(images.numpy(), (pixels - mean) / std, atol=1e-5)


@pytest.mark.parametrize("archive", [False, True])
def test_limits_take_the_first_records(tmp_path, train, archive):
    path = tmp_path / "cifar-10-batches-bin"
    if archive:
        pack(path, path := tmp_path / "c.tar.gz")
    data = load(CifarBinary(path=str(path), **SMALL, limit_train=9, limit_test=2))
    assert (len(data.train), len(data.test)) == (9, 2)
    assert data.train.labels().tolist() == train[:9, 0].tolist()


def test_a_missing_set_lists_every_place(tmp_path):
    with pytest.raises(DataError) as caught:
        load(CifarBinary(root=str(tmp_path)))
    for name in ("cifar-10-batches-bin", "cifar10/cifar-10-binary.tar.xz"):
        assert f"  {tmp_path}/{name}\n" in str(caught.value)


def test_a_folder_without_one_file(tmp_path, train):
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    with pytest.raises(DataError, match="data_batch_2.bin not found"):
        load(CifarBinary(root=str(tmp_path), **SMALL))


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("cut_bytes", [100, CIFAR_RECORD_BYTES])
def test_a_cut_file(tmp_path, train, archive, cut_bytes):
    path = tmp_path / "cifar-10-batches-bin"
    file = path / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-cut_bytes])
    if archive:
        pack(path, path := tmp_path / "c.tar.gz")
    with pytest.raises(DataError, match=r"data_batch_2.*6 records and (2973|0) bytes"):
        load(CifarBinary(path=str(path), **SMALL))


@pytest.mark.parametrize("archive", [False, True])
def test_a_label_out_of_range_names_record_and_byte(tmp_path, train, archive):
    path = tmp_path / "cifar-10-batches-bin"
    content = bytearray((path / "test_batch.bin").read_bytes())
    content[3 * CIFAR_RECORD_BYTES] = 10
    (path / "test_batch.bin").write_bytes(content)
    if archive:
        pack(path, path := tmp_path / "c.tar.xz")
    with pytest.raises(DataError, match=r"test_batch.*label 10 of record 3 \(byte 9219\)"):
        load(CifarBinary(path=str(path), **SMALL))


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.8])
def test_a_truncated_archive(tmp_path, train, ending, kept):
    path = tmp_path / f"c{ending}"
    pack(tmp_path / "cifar-10-batches-bin", path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(DataError, match=rf"c{ending}"):
        load(CifarBinary(path=str(path), **SMALL))


def test_an_archive_of_something_else(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "readme").write_text("x" * 50_000)
    pack(tmp_path / "folder", tmp_path / "c.tar.gz")
    with pytest.raises(DataError, match=r"lacks data_batch_1.bin, .*test_batch.bin"):
        load(CifarBinary(path=str(tmp_path / "c.tar.gz"), **SMALL))
    (tmp_path / "noise.tar").write_bytes(b"noise" * 1000)
    with pytest.raises(DataError, match="not a whole tar archive"):
        load(CifarBinary(path=str(tmp_path / "noise.tar"), **SMALL))


@pytest.mark.data
def test_the_real_set(data_root):
    data = load(CifarBinary(root=str(data_root)))
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert np.bincount(data.train.labels()).tolist() == [5000] * 10
    assert np.bincount(data.test.labels()).tolist() == [1000] * 10
    mean = np.array(data.train.mean_C) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=1e-4)
    std = np.array(data.train.std_C) / 255
    np.testing.assert_allclose(std, [0.2470, 0.2435, 0.2616], atol=1e-4)
