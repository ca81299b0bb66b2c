"""Writes picked entries into messages of constant size, and reads them back with every check.

A slot is one message, or one rank's part of a collective one: a header of 32 bytes and room for
`capacity` entries of a vector of `n`. Codings:

    index "uint32"    4 bytes an entry
    index "block16"   2 bytes an entry, its offset in a block of 65,536, and 4 bytes per block: how
                      many entries lie in it; indices must ascend
    index "none"      0 bytes; the reader knows the positions
    value "float32"   4 bytes
    value "float16"   2 bytes; scaled by a power of two so that the largest fills its range, which
                      keeps 11 bits of every value within 2^-14 of the largest
    value "bfloat16"  2 bytes, 8 bits of every value
    value "sign"      1 bit; the magnitude is the mean of all, once per slot (Khirirat et al. 2020,
                      arXiv 2003.06377: sparsification with quantisation, at its best step size)

    value "none"      0 bytes; positions only

`write` returns what the reader will see, so that the writer can keep the rounding error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from hpctrain.compress.select import Picked

IndexCoding = Literal["uint32", "block16", "none"]
ValueCoding = Literal["float32", "float16", "bfloat16", "sign", "none"]

HEADER_BYTES = 32
_STEP, _BUCKET, _COUNT, _CHECKSUM, _FINITE, _WANTED, _SCALE, _NORM = range(8)
_BLOCK_BITS = 16
_VALUE_BITS: dict[ValueCoding, int] = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "sign": 1,
    "none": 0,
}
_INDEX_BYTES: dict[IndexCoding, int] = {"uint32": 4, "block16": 2, "none": 0}


class WireError(Exception):
    """A slot does not hold what it must: ranks out of step, or damaged bytes."""


@dataclass(frozen=True)
class Coding:
    """How entries are written."""

    index: IndexCoding = "block16"
    value: ValueCoding = "float16"

    def slot_bytes(self, n: int, capacity: int) -> int:
        """Bytes of a slot for up to `capacity` entries of a vector of `n`, a multiple of 8."""
        return HEADER_BYTES + sum(_padded(part) for part in self._parts(n, capacity))

    @property
    def index_bytes(self) -> int:
        """Bytes of a position."""
        return _INDEX_BYTES[self.index]

    @property
    def value_bits(self) -> int:
        """Bits of a value."""
        return _VALUE_BITS[self.value]

    def entry_bytes(self) -> float:
        """Bytes of one more entry, as formulas count them."""
        return self.index_bytes + self.value_bits / 8

    def _parts(self, n: int, capacity: int) -> tuple[int, int, int]:
        """Bytes of the block counts, the indices and the values."""
        values = -(-capacity * _VALUE_BITS[self.value] // 8)
        counts = 4 * _n_blocks(n) if self.index == "block16" else 0
        return counts, _INDEX_BYTES[self.index] * capacity, values


@dataclass(frozen=True)
class Header:
    """What a slot says beside its entries."""

    finite: bool = True
    """Whether all that the sender (and those it speaks for) saw was finite."""
    residual_sq: float = 0.0
    """Sum of squares of the sender's residual."""
    wanted: int = 0
    """How many entries the sender would like to send next."""


class Slot:
    """One slot in `memory`.

    Args:
        memory: uint8, at least `coding.slot_bytes(n, capacity)`, aligned to 8 bytes.
        n: Length of the vector.
        capacity: Most entries.
        coding: How they are written.
    """

    def __init__(self, memory: np.ndarray, n: int, capacity: int, coding: Coding) -> None:
        self.n, self.capacity, self.coding = n, capacity, coding
        counts, indices, values = coding._parts(n, capacity)
        self._words = memory[:HEADER_BYTES].view(np.uint32)
        self._floats = memory[:HEADER_BYTES].view(np.float32)
        body = memory[HEADER_BYTES : coding.slot_bytes(n, capacity)]
        self._body = body.view(np.uint32)
        self._counts = body[:counts].view(np.uint32)
        start = _padded(counts)
        stored = np.uint32 if coding.index == "uint32" else np.uint16
        self._indices = body[start : start + indices].view(stored)
        start += _padded(indices)
        self._values = body[start : start + values]

    def write(self, step: int, bucket: int, picked: Picked, header: Header) -> np.ndarray:
        """Write up to `capacity` entries; the rest of the slot is left as it is. Local.

        Returns:
            (K,) float32: the values as `read` will give them.
        """
        count = len(picked.indices_K) if self.coding.index != "none" else len(picked.values_K)
        if count > self.capacity:
            raise ValueError(f"{count} entries do not fit a slot of {self.capacity}")
        if self.coding.index == "uint32":
            self._indices[:count] = picked.indices_K
        elif self.coding.index == "block16":
            edges = np.arange(1, len(self._counts) + 1, dtype=np.int64) << _BLOCK_BITS
            ends = np.searchsorted(picked.indices_K, edges)
            self._counts[:] = np.diff(ends, prepend=0)
            np.copyto(self._indices[:count], picked.indices_K, casting="unsafe")
        scale, sent = 1.0, picked.values_K
        if header.finite and self.coding.value != "none":
            scale, sent = self._write_values(picked.values_K)
        self._words[_STEP] = step & 0xFFFFFFFF
        self._words[_BUCKET] = bucket
        self._words[_COUNT] = count
        self._words[_FINITE] = header.finite
        self._words[_WANTED] = header.wanted
        self._floats[_SCALE] = scale
        self._floats[_NORM] = min(header.residual_sq, float(np.finfo(np.float32).max))
        self._words[_CHECKSUM] = self._checksum()
        return sent

    def header(self, step: int, bucket: int) -> Header:
        """Check the whole slot; what it says beside its entries. Local.

        Raises:
            WireError: the slot is of another step or bucket, or its bytes are damaged.
        """
        count = int(self._words[_COUNT])
        stated = (int(self._words[_STEP]), int(self._words[_BUCKET]))
        if stated != (step & 0xFFFFFFFF, bucket):
            raise WireError(
                f"a message of step {stated[0]}, bucket {stated[1]} arrived where step {step}, "
                f"bucket {bucket} was expected: the ranks are out of step"
            )
        if count > self.capacity or int(self._words[_CHECKSUM]) != self._checksum():
            raise WireError(
                f"the message of step {step}, bucket {bucket} is damaged (count {count} of at most "
                f"{self.capacity}, checksum {int(self._words[_CHECKSUM])})"
            )
        return Header(
            bool(self._words[_FINITE]), float(self._floats[_NORM]), int(self._words[_WANTED])
        )

    def read(self, step: int, bucket: int) -> tuple[Header, np.ndarray, np.ndarray]:
        """Check the slot; its header, indices (int64) and values (float32). Local.

        Raises:
            WireError: as of `header`.
        """
        header, count = self.header(step, bucket), int(self._words[_COUNT])
        indices = self._indices[: count if self.coding.index != "none" else 0].astype(np.int64)
        if self.coding.index == "block16":
            blocks = np.arange(len(self._counts), dtype=np.int64) << _BLOCK_BITS
            indices += np.repeat(blocks, self._counts)
        return header, indices, self._read_values(count)

    def _write_values(self, values_K: np.ndarray) -> tuple[float, np.ndarray]:
        """Store the values; their scale, and the values as they will be read."""
        count, coding = len(values_K), self.coding.value
        scale = 1.0
        if coding == "float32":
            self._values[: 4 * count].view(np.float32)[:] = values_K
        elif coding == "sign":
            scale = float(np.abs(values_K).mean(dtype=np.float64)) if count else 0.0
            packed = np.packbits(values_K < 0.0, bitorder="little")
            self._values[: len(packed)] = packed
        elif coding == "float16":
            largest = float(np.abs(values_K).max()) if count else 0.0
            # Of a power of two, so that scaling rounds nothing; 2^15 stays below float16's 65504.
            scale = 2.0 ** (np.frexp(largest)[1] - 15) if largest else 1.0
            scale = min(max(scale, 2.0**-120), 2.0**120)
            # torch, here and below, because it converts ten times faster than NumPy.
            scaled = torch.from_numpy(values_K * np.float32(1.0 / scale))
            torch.from_numpy(self._values[: 2 * count].view(np.float16)).copy_(scaled)
        else:
            half = torch.from_numpy(values_K).to(torch.bfloat16)
            self._values[: 2 * count].view(np.int16)[:] = half.view(torch.int16).numpy()
        self._floats[_SCALE] = scale
        return scale, values_K if coding == "float32" else self._read_values(count)

    def _read_values(self, count: int) -> np.ndarray:
        coding, scale = self.coding.value, self._floats[_SCALE]
        values: np.ndarray
        if coding == "none":
            values = np.empty(0, np.float32)
        elif coding == "float32":
            values = self._values[: 4 * count].view(np.float32).copy()
        elif coding == "sign":
            packed = self._values[: -(-count // 8)]
            negative = np.unpackbits(packed, count=count, bitorder="little").view(np.bool_)
            values = np.where(negative, -scale, scale)
        elif coding == "float16":
            halves = torch.from_numpy(self._values[: 2 * count].view(np.float16))
            values = halves.float().numpy()
            values *= scale
        else:
            words = self._values[: 2 * count].view(np.uint16).astype(np.uint32)
            values = (words << np.uint32(16)).view(np.float32)
        return values

    def _checksum(self) -> int:
        """Sum modulo 2^32 of the body's words and the header's words but itself."""
        words = int(self._words.sum(dtype=np.uint64)) - int(self._words[_CHECKSUM])
        return (words + int(self._body.sum(dtype=np.uint32))) & 0xFFFFFFFF


def _n_blocks(n: int) -> int:
    return -(-n >> _BLOCK_BITS) if n else 0


def _padded(nbytes: int) -> int:
    return -(-nbytes // 8) * 8
