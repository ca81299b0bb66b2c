"""Slots bring back what they said they would, and refuse everything else."""

from __future__ import annotations

from itertools import product
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.compress.select import Picked
from hpctrain.compress.wire import (
    HEADER_BYTES,
    Coding,
    Header,
    IndexCoding,
    Slot,
    ValueCoding,
    WireError,
)

INDEX: tuple[IndexCoding, ...] = get_args(IndexCoding)
VALUE: tuple[ValueCoding, ...] = get_args(ValueCoding)
CODINGS = [Coding(index, value) for index in INDEX for value in VALUE]
SIZES = [0, 1, 2, 999, 65_535, 65_536, 65_537, 200_001]
NAMED = {"argvalues": CODINGS, "ids": lambda coding: f"{coding.index}-{coding.value}"}


def entries(n: int, count: int, seed: int = 0, scale: float = 1.0) -> Picked:
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.choice(n, count, replace=False)) if count else np.empty(0, np.int64)
    values = (rng.standard_normal(count) * scale).astype(np.float32)
    return Picked(indices.astype(np.uint32), values, finite=True)


def slot_of(n: int, capacity: int, coding: Coding) -> tuple[Slot, np.ndarray]:
    memory = np.zeros(coding.slot_bytes(n, capacity), np.uint8)
    return Slot(memory, n, capacity, coding), memory


def worst_error(coding: Coding, values_K: np.ndarray) -> np.ndarray:
    """What the module's text promises for each value."""
    magnitudes = np.abs(values_K.astype(np.float64))
    if coding.value == "float32" or not len(values_K):
        return np.zeros(len(values_K))
    if coding.value == "float16":
        tiny = 2.0**-145  # a value can be a denormal float32 after scaling back
        return np.maximum(magnitudes * 2.0**-11, magnitudes.max() * 2.0**-14 * 2.0**-11) + tiny
    return np.maximum(magnitudes * 2.0**-8, 2.0**-134)


@pytest.mark.parametrize("coding", **NAMED)
def test_what_is_read_is_what_write_returned(coding):
    for n in SIZES:
        for count in (0, min(n, 1), n // 100, min(n, 20_000)):
            picked = entries(n, count, seed=n)
            slot, _ = slot_of(n, count, coding)
            header = Header(residual_sq=2.5, wanted=77)
            written = slot.write(3, 5, picked, header)
            found, indices, values = slot.read(3, 5)
            assert found == header
            np.testing.assert_array_equal(
                indices, picked.indices_K if coding.index != "none" else []
            )
            assert (indices.dtype, values.dtype) == (np.int64, np.float32)
            if coding.value == "none":
                assert len(values) == 0
                continue
            np.testing.assert_array_equal(values, written)
            assert written.dtype == np.float32
            if coding.value == "sign":
                np.testing.assert_array_equal(values < 0, picked.values_K < 0)
                mean = np.abs(picked.values_K).mean() if count else 0.0
                np.testing.assert_allclose(np.abs(values), mean, rtol=1e-5)
            else:
                error = np.abs(values.astype(np.float64) - picked.values_K)
                assert (error <= worst_error(coding, picked.values_K)).all()


@settings(max_examples=150)
@given(
    values=st.lists(
        st.floats(2.0**-126, 2.0**126, width=32).flatmap(lambda x: st.sampled_from([x, -x, 0.0])),
        max_size=40,
    ),
    value=st.sampled_from([v for v in VALUE if v not in ("none", "sign")]),
)
def test_rounding_stays_within_bounds_at_every_scale(values, value):
    picked = Picked(np.arange(len(values), dtype=np.uint32), np.array(values, np.float32), True)
    coding = Coding("uint32", value)
    slot, _ = slot_of(50, 40, coding)
    written = slot.write(0, 0, picked, Header())
    np.testing.assert_array_equal(slot.read(0, 0)[2], written)
    error = np.abs(written.astype(np.float64) - picked.values_K)
    assert (error <= worst_error(coding, picked.values_K)).all()
    assert np.isfinite(written).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("value", ["float16", "bfloat16", "sign"])
def test_the_unit_of_the_values_does_not_matter(value, scale):
    picked = entries(1000, 100, scale=scale)
    slot, _ = slot_of(1000, 100, Coding("block16", value))
    written = slot.write(0, 0, picked, Header())
    lost = np.linalg.norm((written - picked.values_K).astype(np.float64) / scale)
    assert lost < (8.0 if value == "sign" else 0.03)
    if value == "sign":
        assert lost > 0.0


def test_float16_uses_the_whole_range_of_the_format():
    values = np.float32([1.0, 2.0**-14, 2.0**-14 * (1 + 2.0**-10), -3e-7])
    picked = Picked(np.arange(4, dtype=np.uint32), values, True)
    slot, _ = slot_of(4, 4, Coding("uint32", "float16"))
    written = slot.write(0, 0, picked, Header())
    np.testing.assert_array_equal(written[:3], values[:3])
    np.testing.assert_allclose(written[3], -3e-7, rtol=2.0**-10)


@pytest.mark.parametrize("coding", **NAMED)
def test_the_size_of_a_slot_is_the_formula(coding):
    for n, capacity in product(SIZES, (0, 1, 3, 1000)):
        blocks = -(-n // 65_536) if coding.index == "block16" else 0
        parts = (
            4 * blocks,
            {"uint32": 4, "block16": 2, "none": 0}[coding.index] * capacity,
            -(-{"float32": 32, "float16": 16, "bfloat16": 16, "sign": 1, "none": 0}[coding.value]
              * capacity // 8),
        )  # fmt: skip
        nbytes = coding.slot_bytes(n, capacity)
        assert nbytes == HEADER_BYTES + sum(-(-part // 8) * 8 for part in parts)
        assert nbytes % 8 == 0
    step = (coding.slot_bytes(70_000, 64_000) - coding.slot_bytes(70_000, 0)) / 64_000
    assert step == coding.entry_bytes()


@pytest.mark.parametrize("coding", **NAMED)
def test_a_slot_can_be_used_again_with_fewer_entries(coding):
    n = 70_000
    slot, memory = slot_of(n, 500, coding)
    size = len(memory)
    for step, count in enumerate((500, 3, 0, 250)):
        picked = entries(n, count, seed=step)
        written = slot.write(step, 1, picked, Header())
        _, indices, values = slot.read(step, 1)
        if coding.index != "none":
            np.testing.assert_array_equal(indices, picked.indices_K)
        if coding.value != "none":
            np.testing.assert_array_equal(values, written)
            assert len(values) == count
    assert len(memory) == size


@pytest.mark.parametrize("coding", **NAMED)
def test_more_than_the_capacity_is_refused(coding):
    slot, _ = slot_of(100, 9, coding)
    slot.write(0, 0, entries(100, 9), Header())
    with pytest.raises(ValueError, match="10 entries do not fit a slot of 9"):
        slot.write(0, 0, entries(100, 10), Header())


@pytest.mark.parametrize("header", [Header(), Header(False, 1.25, 3), Header(True, 0.0, 2**32 - 1)])
@pytest.mark.parametrize("step", [0, 1, 2**31, 2**32 - 1, 2**32 + 5])
def test_the_header_comes_back(header, step):
    slot, _ = slot_of(10, 4, Coding())
    slot.write(step, 4, entries(10, 4), header)
    assert slot.read(step, 4)[0] == header


def test_a_header_that_says_not_finite_may_carry_nothing():
    empty = Picked(np.empty(0, np.uint32), np.empty(0, np.float32), finite=True)
    for coding in CODINGS:
        slot, _ = slot_of(70_000, 9, coding)
        slot.write(1, 0, empty, Header(finite=False, residual_sq=1.0))
        header, indices, values = slot.read(1, 0)
        assert (header.finite, len(indices), len(values)) == (False, 0, 0)


def test_another_step_or_bucket_is_refused():
    slot, _ = slot_of(10, 4, Coding())
    slot.write(7, 2, entries(10, 4), Header())
    slot.read(7, 2)
    for step, bucket in ((8, 2), (7, 3), (6, 2), (7 + 2**16, 2)):
        with pytest.raises(WireError, match="step 7, bucket 2 arrived where step"):
            slot.read(step, bucket)


def test_memory_that_nobody_wrote_is_refused():
    slot, _ = slot_of(10, 4, Coding())
    with pytest.raises(WireError):
        slot.read(1, 0)


@pytest.mark.parametrize("coding", **NAMED)
def test_every_flipped_byte_is_refused(coding):
    slot, memory = slot_of(70_000, 21, coding)
    slot.write(7, 2, entries(70_000, 17), Header(residual_sq=1.5, wanted=3))
    slot.read(7, 2)
    rng = np.random.default_rng(0)
    for at in range(len(memory)):
        before = memory[at]
        for flip in {1 << int(rng.integers(8)), 0xFF, int(rng.integers(1, 256))}:
            memory[at] = before ^ np.uint8(flip)
            with pytest.raises(WireError):
                slot.read(7, 2)
        memory[at] = before
    slot.read(7, 2)


def test_a_lost_piece_of_a_message_is_refused():
    slot, memory = slot_of(5000, 400, Coding())
    slot.write(7, 2, entries(5000, 400), Header())
    stale = memory.copy()
    slot.write(8, 2, entries(5000, 400, seed=9), Header())
    memory[1000:] = stale[1000:]
    with pytest.raises(WireError, match="damaged"):
        slot.read(8, 2)
