from __future__ import annotations

import bz2
import gzip
import lzma

import numpy as np
import pytest
from data_files import load, load_on
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data import Text, files
from hpctrain.data.corpus import TextSamples
from hpctrain.data.spec import Spec
from hpctrain.errors import DataError

PROSE = "".join(f"Zeile {i}: größer als π, kleiner als {i * 7}.\n" for i in range(60))


def decode(data, vocabulary: str) -> str:
    """The held-out text as the windows have it."""
    inputs, targets = data.test.batch(np.arange(len(data.test)), 0)
    tokens = [*inputs.flatten().tolist(), int(targets[-1, -1])]
    return "".join(vocabulary[token] for token in tokens)


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("tokens", ["byte", "char"])
@pytest.mark.parametrize("piece_bytes", [7, 1 << 20])
def test_windows_hold_the_text(tmp_path, monkeypatch, ending, tokens, piece_bytes):
    monkeypatch.setattr(files, "CHUNK_BYTES", piece_bytes)
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending]
    (tmp_path / f"prose.txt{ending}").write_bytes(pack(PROSE.encode()))
    config = Text(
        root=str(tmp_path), train="prose.txt", tokens=tokens, context=8, test_fraction=0.25
    )
    data = load(config)
    whole = PROSE.encode().decode("latin-1") if tokens == "byte" else PROSE
    vocabulary = "".join(map(chr, range(256))) if tokens == "byte" else "".join(sorted({*PROSE}))
    assert data.spec == Spec("language", (8,), "int64", len(vocabulary))
    border = len(whole) - int(len(whole) * 0.25)
    held = whole[border:]
    assert decode(data, vocabulary) == held[: len(data.test) * 8 + 1]
    assert len(data.test) == (len(held) - 1) // 8
    shift = data.train.shift(3)
    inputs, targets = data.train.batch(np.array([5, 0]), 3)
    for row, start in enumerate((shift + 5 * 8, shift)):
        assert "".join(vocabulary[t] for t in inputs[row]) == whole[start : start + 8]
        assert "".join(vocabulary[t] for t in targets[row]) == whole[start + 1 : start + 9]
    assert data.nbytes == len(whole)


def test_a_plain_file_by_bytes_is_mapped_not_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(PROSE.encode())
    data = load(Text(root=str(tmp_path), train="a.txt", test="a.txt", context=8))
    assert isinstance(data.train.tokens, np.memmap)
    assert isinstance(data.test.tokens, np.memmap)
    assert data.train.nbytes == data.test.nbytes == len(PROSE.encode())


@given(n=st.integers(1, 200), context=st.integers(1, 20), epoch=st.integers(0, 5))
def test_windows_never_overlap_or_leave_the_text(n, context, epoch):
    for seed in (None, 4):
        samples = TextSamples(np.arange(n, dtype=np.uint16), context, seed)
        if not len(samples):
            continue
        inputs, targets = samples.batch(np.arange(len(samples)), epoch)
        assert np.array_equal(targets, inputs + 1)
        start = samples.shift(epoch)
        assert 0 <= start < context
        flat = inputs.flatten().tolist()
        assert flat == list(range(start, start + len(samples) * context))
        assert int(targets[-1, -1]) < n
        if seed is None:
            assert n - 1 - len(flat) < context  # nothing more would fit


def test_every_epoch_cuts_elsewhere():
    samples = TextSamples(np.zeros(1000, np.uint8), 64, 0)
    assert len({samples.shift(epoch) for epoch in range(50)}) > 20


@pytest.mark.parametrize("context", [8, 9])
def test_limits_count_windows(tmp_path, context):
    (tmp_path / "a.txt").write_bytes(PROSE.encode())
    config = Text(root=str(tmp_path), train="a.txt", context=context, limit_train=5, limit_test=3)
    data = load(config)
    assert (len(data.train), len(data.test)) == (5, 3)


def test_more_than_256_characters(tmp_path):
    many = "".join(chr(0x4E00 + i % 700) for i in range(5000))
    (tmp_path / "a.txt").write_text(many, encoding="utf-8")
    data = load(Text(root=str(tmp_path), train="a.txt", tokens="char", context=10))
    assert data.spec.n_outputs == 700
    assert data.train.tokens.dtype == np.uint16
    assert decode(data, "".join(sorted({*many}))) == many[4500 : 4500 + len(data.test) * 10 + 1]


def test_an_unknown_character_in_the_held_out_text_is_named(tmp_path):
    (tmp_path / "train.txt").write_text("abc " * 50, encoding="utf-8")
    (tmp_path / "valid.txt").write_text("abc " * 5 + "aé", encoding="utf-8")
    config = Text(root=str(tmp_path), train="train.txt", test="valid.txt", tokens="char", context=4)
    with pytest.raises(DataError, match=r"valid.txt: character 'é' \(U\+00E9\) at character 21"):
        load_on(2, config)


def test_an_unknown_character_in_the_held_out_part_too(tmp_path):
    (tmp_path / "a.txt").write_text("abc " * 50 + "xyz " * 5, encoding="utf-8")
    with pytest.raises(DataError, match=r"character 'x' \(U\+0078\) at character 200"):
        load(Text(root=str(tmp_path), train="a.txt", tokens="char", context=4, test_fraction=0.1))


@pytest.mark.parametrize("piece_bytes", [3, 1 << 20])
@pytest.mark.parametrize(("tail", "place"), [(b"\xff abc", 100), (b"abc\xc3", 103)])
def test_not_utf8_names_the_byte(tmp_path, monkeypatch, tail, place, piece_bytes):
    monkeypatch.setattr(files, "CHUNK_BYTES", piece_bytes)
    (tmp_path / "a.txt").write_bytes("é".encode() * 50 + tail)
    with pytest.raises(DataError, match=f"not UTF-8 at byte {place} "):
        load(Text(root=str(tmp_path), train="a.txt", tokens="char", context=4))


@pytest.mark.parametrize(
    ("content", "keys", "wrong"),
    [
        (b"", {}, "0 bytes for the train part"),
        (b"abcdefg", {"context": 20}, "one window with data.context = 20 needs 40"),
        (b"abcdefg" * 9, {"context": 20}, "for the test part"),
    ],
)
def test_too_short_a_text(tmp_path, content, keys, wrong):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=wrong):
        load(Text(root=str(tmp_path), train="a.txt", **keys))


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_truncated_compressed_text(tmp_path, ending):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending]
    noise = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8).tobytes()
    (tmp_path / f"a.txt{ending}").write_bytes(pack(noise)[:-2000])
    with pytest.raises(DataError, match=rf"a.txt{ending}: truncated after byte \d+"):
        load(Text(root=str(tmp_path), train="a.txt"))


def test_a_folder_is_no_text(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DataError, match=r"a.txt: cannot be read: Is a directory"):
        load(Text(root=str(tmp_path), train="a.txt"))


def test_a_missing_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(PROSE.encode())
    with pytest.raises(DataError, match=r"the held-out text not found(.|\n)*b.txt.xz"):
        load(Text(root=str(tmp_path), train="a.txt", test="b.txt"))


@pytest.mark.data
def test_the_real_texts(data_root):
    data = load(Text(root=str(data_root), train="text/tinyshakespeare.txt", tokens="char"))
    assert data.spec.n_outputs == 65
    assert data.nbytes == 1_115_394
    novels = load(
        Text(
            root=str(data_root),
            train="text/novels-train.txt",
            test="text/novels-valid.txt",
            tokens="char",
        )
    )
    assert novels.spec.n_outputs == 89
    assert (novels.train.nbytes, novels.test.nbytes) == (49_542_232, 1_876_957)
