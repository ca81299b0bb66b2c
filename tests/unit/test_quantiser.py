"""Few bits per entry: what is read is what the formulas say, in as many bytes as stated."""

from __future__ import annotations

import numpy as np
import pytest

from hpctrain.compress.quantiser import Quantiser

CODINGS = [("sign", 1), ("qsgd", 2), ("qsgd", 4), ("qsgd", 8)]
LENGTHS = [0, 1, 31, 32, 100, 512, 70_001, 200_000]


def random_for(seed=0):
    return np.random.default_rng(seed)


def padded(levels, x):
    return np.concatenate([x, np.zeros(levels.padded - len(x))]).astype(np.float32)


def round_trip(levels, x, seed=0):
    """(what everybody reads, the message)."""
    message = np.zeros(levels.message_bytes, np.uint8)
    levels.write(padded(levels, x), message, random_for(seed))
    read = np.full(levels.padded, np.nan, np.float32)
    for chunks in levels.blocks():
        levels.read(message, chunks, read[levels.entries(chunks)])
    assert not read[levels.n :].any()
    return read[: levels.n], message


@pytest.mark.parametrize(("scheme", "bits"), CODINGS)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("chunk", [32, 512])
def test_message_holds_a_scale_per_chunk_and_bits_per_entry(scheme, bits, n, chunk):
    levels = Quantiser(n, scheme, bits, chunk)
    chunks = -(-n // chunk)
    assert levels.message_bytes == chunks * (4 + chunk * bits // 8)
    read, message = round_trip(levels, random_for(n).standard_normal(n))
    assert message.size == levels.message_bytes
    assert np.isfinite(read).all()
    assert len(np.unique(np.abs(read))) <= chunks * (levels.top + 1)


@pytest.mark.parametrize("n", LENGTHS)
def test_signs_are_those_of_the_formula(n):
    x = random_for(n).standard_normal(n).astype(np.float32)
    read, _ = round_trip(Quantiser(n, "sign", 1, 64), x)
    for start in range(0, n, 64):
        part = x[start : start + 64].astype(np.float64)
        expected = np.abs(part).mean() * np.where(part >= 0, 1, -1)
        np.testing.assert_allclose(read[start : start + 64], expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", LENGTHS)
def test_levels_are_those_of_the_formula(bits, n):
    x = random_for(n).standard_normal(n).astype(np.float32)
    top = 2 ** (bits - 1) - 1
    levels = Quantiser(n, "qsgd", bits, 64, unbiased=True)
    read, _ = round_trip(levels, x, seed=5)
    draws = random_for(5).random(levels.padded, np.float32)
    for start in range(0, n, 64):
        part, u = x[start : start + 64], draws[start : start + 64]
        norm = np.abs(part).max()
        level = np.floor(top * (np.abs(part) / norm) + u[: len(part)])
        np.testing.assert_allclose(
            read[start : start + 64], norm / top * level * np.sign(part), rtol=1e-6
        )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unbiased_levels_have_the_right_expectation(bits):
    x = random_for(1).standard_normal(96)
    draws = [round_trip(Quantiser(96, "qsgd", bits, 32, True), x, seed)[0] for seed in range(4000)]
    step = np.abs(x).max() / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(np.mean(draws, axis=0), x, atol=5 * step / 2 / np.sqrt(4000))


@pytest.mark.parametrize(("scheme", "bits"), CODINGS)
@pytest.mark.parametrize("tail", [0.3, 1, 3])
def test_what_is_left_is_shorter_than_what_was_there(scheme, bits, tail):
    levels = Quantiser(1000, scheme, bits, 128)
    for seed in range(20):
        x = random_for(seed).standard_normal(1000)
        x = np.sign(x) * np.abs(x) ** tail
        left = x - round_trip(levels, x, seed)[0]
        for start in range(0, 1000, 128):
            part = slice(start, start + 128)
            assert np.linalg.norm(left[part]) < np.linalg.norm(x[part])


@pytest.mark.parametrize(("scheme", "bits"), CODINGS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_vectors_made_of_levels_are_kept_exactly(scheme, bits, unbiased):
    levels = Quantiser(64, scheme, bits, 32, unbiased)
    x = random_for(0).integers(-levels.top, levels.top + 1, 64).astype(np.float32)
    x[::32] = levels.top
    if scheme == "sign":
        x = np.where(x >= 0, 1, -1)
    for scale in (1.0, 0.25, 2.0**-60):
        np.testing.assert_allclose(round_trip(levels, x * scale)[0], x * scale, rtol=1e-6)


@pytest.mark.parametrize(("scheme", "bits"), CODINGS)
def test_extreme_vectors(scheme, bits):
    levels = Quantiser(70, scheme, bits, 32)
    assert not round_trip(levels, np.zeros(70))[0].any()
    lone = np.zeros(70)
    lone[40] = -3.0
    read, _ = round_trip(levels, lone)
    assert not read[:32].any()
    assert not read[64:].any()
    assert read[40] == pytest.approx(-3.0 / 32 if scheme == "sign" else -3.0)
    for size in (1e-40, 1e36):
        x = random_for(3).standard_normal(70) * size
        assert np.isfinite(round_trip(levels, x)[0]).all()


def test_a_draw_next_to_one_does_not_leave_the_levels():
    class Draws:
        def random(self, shape, dtype):
            return np.full(shape, np.nextafter(dtype(1), dtype(0)), dtype)

    levels = Quantiser(32, "qsgd", 8, 32, True)
    message = np.zeros(levels.message_bytes, np.uint8)
    levels.write(np.full(32, -5, np.float32), message, Draws())
    read = np.empty(32, np.float32)
    levels.read(message, levels.blocks()[0], read)
    np.testing.assert_allclose(read, -5, rtol=1e-6)


@pytest.mark.parametrize(("scheme", "bits"), CODINGS)
def test_messages_add_up_in_rank_order(scheme, bits):
    n = 66_000
    levels = Quantiser(n, scheme, bits, 512)
    xs = [random_for(rank).standard_normal(n) for rank in range(3)]
    read, messages = zip(*(round_trip(levels, x, rank) for rank, x in enumerate(xs)), strict=True)
    total, acc = np.empty(levels.padded, np.float32), padded(levels, xs[1])
    assert levels.add_up(np.stack(messages), total, 1, acc)
    np.testing.assert_array_equal(total[:n], read[0] + read[1] + read[2])
    np.testing.assert_array_equal(acc[:n], xs[1].astype(np.float32) - read[1])
    assert not acc[n:].any()


def test_a_sum_out_of_range_is_refused_and_nothing_changes():
    levels = Quantiser(32, "qsgd", 8, 32)
    _, message = round_trip(levels, np.full(32, 1e38))
    total, acc = np.zeros(32, np.float32), np.ones(32, np.float32)
    assert not levels.add_up(np.stack([message] * 4), total, 0, acc)
    assert not total.any()
    assert (acc == 1).all()
    assert levels.add_up(np.stack([message] * 3), total, 0, acc)
