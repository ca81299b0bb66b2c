from __future__ import annotations

import bz2
import gzip

import numpy as np
import pytest
from data_files import idx_bytes, load, load_on, random_images, write_mnist

from hpctrain.data import Idx
from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError, DataError

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def test_reads_plain_and_compressed_and_normalises_by_the_training_set(tmp_path):
    arrays = write_mnist(tmp_path)
    data = load(Idx(root=str(tmp_path)))
    assert data.spec == Spec("classification", (1, 6, 5), "float32", 10)
    images, labels = data.train.batch(np.arange(40), 0)
    assert images.mean() == pytest.approx(0, abs=1e-6)
    assert images.std(correction=0) == pytest.approx(1, rel=1e-6)
    original = arrays["train-images-idx3-ubyte"].astype(np.float64)
    expected = (original - original.mean()) / original.std()
    np.testing.assert_allclose(images[:, 0].numpy(), expected, atol=1e-6)
    assert labels.tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    held, _ = data.test.batch(np.array([3]), 0)
    expected = (arrays["t10k-images-idx3-ubyte"][3] - original.mean()) / original.std()
    np.testing.assert_allclose(held[0, 0].numpy(), expected, atol=1e-6)


def test_given_moments_limits_and_other_names(tmp_path):
    arrays = write_mnist(tmp_path)
    (tmp_path / "mnist").rename(tmp_path / "other")
    (tmp_path / "other" / IMAGES).unlink()
    (tmp_path / "other" / "x.bz2").write_bytes(
        bz2.compress(idx_bytes(arrays["train-images-idx3-ubyte"]))
    )
    config = Idx(
        root=str(tmp_path), folder="other", train_images="x", limit_train=10, mean=[0.5], std=[0.25]
    )
    data = load(config)
    assert (len(data.train), len(data.test)) == (10, 12)
    images, _ = data.train.batch(np.arange(10), 0)
    expected = (arrays["train-images-idx3-ubyte"][:10] / 255.0 - 0.5) / 0.25
    np.testing.assert_allclose(images[:, 0].numpy(), expected, atol=1e-6)


def test_images_with_channels(tmp_path):
    arrays = write_mnist(tmp_path)
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        colour = random_images(len(arrays[name]), (2, 6, 5))
        (tmp_path / "mnist" / name).write_bytes(idx_bytes(colour))
    data = load(Idx(root=str(tmp_path)))
    assert data.spec.input_shape == (2, 6, 5)
    assert data.train.batch(np.arange(40), 0)[0].mean((0, 2, 3)).abs().max() < 1e-6


def test_augmentation_touches_training_images_only(tmp_path):
    write_mnist(tmp_path)
    plain, other = load(Idx(root=str(tmp_path))), load(Idx(root=str(tmp_path), augment="crop-flip"))
    indices = np.arange(12)
    first = other.train.batch(indices, 0)[0]
    assert not first.equal(plain.train.batch(indices, 0)[0])
    assert not first.equal(other.train.batch(indices, 1)[0])
    assert first.equal(other.train.batch(indices, 0)[0])
    assert other.test.batch(indices, 0)[0].equal(plain.test.batch(indices, 0)[0])


def test_a_missing_file_lists_every_place_and_what_to_do(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    (tmp_path / "mnist" / IMAGES).unlink()
    monkeypatch.setenv("HPCTRAIN_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load(Idx())
    for ending in ("", ".gz", ".bz2", ".xz"):
        assert f"{tmp_path}/mnist/train-images-idx3-ubyte{ending}\n" in str(caught.value)
    assert "comes from $HPCTRAIN_DATA" in str(caught.value)
    assert "data.train_images" in str(caught.value)


def test_the_root_is_the_key_then_the_variable_then_the_working_directory(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPCTRAIN_DATA", raising=False)
    load(Idx())
    monkeypatch.setenv("HPCTRAIN_DATA", str(empty))
    with pytest.raises(DataError, match=r"\$HPCTRAIN_DATA"):
        load(Idx())
    load(Idx(root="."))
    with pytest.raises(DataError, match=r"comes from data\.root"):
        load(Idx(root="empty"))


def damage_gz(path, cut_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut_bytes])


def test_a_truncated_gz_names_file_and_offset(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "mnist" / IMAGES
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{IMAGES}: truncated after byte \d+ of the unpacked"):
        load(Idx(root=str(tmp_path)))


def test_a_flipped_bit_in_a_gz_is_found(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "mnist" / IMAGES
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{IMAGES}: corrupt after byte \d+"):
        load(Idx(root=str(tmp_path)))


def test_no_gz_at_all(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "mnist" / IMAGES).write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match=r"corrupt after byte 0 .*[Nn]ot a gzipped file"):
        load(Idx(root=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("t10k-images-idx3-ubyte", b"", "ends at byte 0"),
        ("t10k-images-idx3-ubyte", b"\0\0\x0d\x03" + bytes(12), "starts with bytes 00 00 0d 03"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros(12)), "starts with bytes 00 00 08 01"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((12, 6, 5)))[:-1], "truncated"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((12, 6, 5))) + b"x", "too long"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((0, 6, 5))), "holds nothing"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((12, 6, 6))), "must have one shape"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((11, 6, 5))), "11 images, .* 12 labels"),
        ("t10k-labels-idx1-ubyte", idx_bytes(np.arange(12)), r"label 10 of record 10 \(byte 18\)"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, content, wrong):
    write_mnist(tmp_path)
    (tmp_path / "mnist" / name).write_bytes(content)
    with pytest.raises(DataError, match=wrong) as caught:
        load(Idx(root=str(tmp_path)))
    assert name in str(caught.value)


def test_a_gz_that_goes_on_after_its_last_record(tmp_path):
    write_mnist(tmp_path)
    content = idx_bytes(np.zeros((40, 6, 5))) + b"more"
    (tmp_path / "mnist" / IMAGES).write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match="goes on after byte 1216"):
        load(Idx(root=str(tmp_path)))


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"mean": [0.1, 0.2], "std": [1.0, 1.0]}, "2 entries; the images have 1"),
        ({"augment": "crop-flip"}, "shifts by 4 pixels; the images have 6x4"),
    ],
)
def test_keys_that_do_not_fit_the_images(tmp_path, keys, wrong):
    write_mnist(tmp_path)
    for name, count in (("train-images-idx3-ubyte", 40), ("t10k-images-idx3-ubyte", 12)):
        (tmp_path / "mnist" / name).write_bytes(idx_bytes(np.zeros((count, 6, 4))))
    with pytest.raises(ConfigError, match=wrong):
        load_on(2, Idx(root=str(tmp_path), **keys))


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)]
)
def test_the_real_sets(data_root, folder, mean, std):
    data = load(Idx(root=str(data_root), folder=folder))
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.nbytes == 70_000 * 785
    assert data.train.mean_C[0] / 255 == pytest.approx(mean, abs=1e-4)
    assert data.train.std_C[0] / 255 == pytest.approx(std, abs=1e-4)
