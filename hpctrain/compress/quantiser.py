"""Vectors as few bits per entry and one scale per chunk.

    x ~ scale * level       level: an integer of magnitude at most s, one of 2^bits codes

    "sign", 1 bit: level = +1 or -1 (a zero counts as +1), scale = mean |x| of the chunk.
    "qsgd", b bits: s = 2^(b-1) - 1; level = sign(x) floor(s |x| / max|x| + u), u uniform in [0, 1).
        Unbiased: scale = max|x| / s, so that the expectation is x.
        Otherwise: scale = <x, level> / <level, level>, the best one for the drawn levels: what is
        left of x is then never longer than x, which error feedback needs (an unbiased level of few
        bits can leave more than it takes away, and residuals would grow without bound).

The mean magnitude is the best scale of signs in the same sense. A message holds the scales of all
chunks (float32), then the codes; within a block of chunks, code j of a byte belongs to the j-th
stretch of entries. Reading is exact arithmetic entry by entry: all machines read the same bits.

Source: signs by Karimireddy, Rebjock, Stich, Jaggi 2019 (arXiv 1901.09847, Algorithm 1); levels by
Alistarh et al. 2017 (QSGD, arXiv 1610.02132), with the largest magnitude of a chunk as its norm
and plain codes instead of Elias codes, as in the authors' experiments. Everything is local.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Scheme = Literal["sign", "qsgd"]

_BLOCK_ENTRIES = 1 << 16


@dataclass(frozen=True)
class Quantiser:
    """How `n` entries are written.

    Args:
        n: Entries of the vector.
        scheme: How levels are chosen.
        bits: Per entry; 1 for signs, else 2, 4 or 8.
        chunk: Entries with one scale, a multiple of 32.
        unbiased: With "qsgd": see above.
    """

    n: int
    scheme: Scheme
    bits: int
    chunk: int
    unbiased: bool = False

    @property
    def n_chunks(self) -> int:
        """Scales; the last chunk may be shorter."""
        return -(-self.n // self.chunk)

    @property
    def padded(self) -> int:
        """Entries of whole chunks: the length of what is written and read."""
        return self.n_chunks * self.chunk

    @property
    def message_bytes(self) -> int:
        """Bytes of a message: 4 per chunk, and `bits` / 8 per entry of whole chunks."""
        return 4 * self.n_chunks + self.padded * self.bits // 8

    @property
    def top(self) -> int:
        """The largest level, s."""
        return 1 if self.bits == 1 else 2 ** (self.bits - 1) - 1

    def blocks(self) -> list[range]:
        """Chunks of each block; a block fits the cache."""
        step = max(1, _BLOCK_ENTRIES // self.chunk)
        starts = range(0, self.n_chunks, step)
        return [range(start, min(start + step, self.n_chunks)) for start in starts]

    def entries(self, chunks: range) -> slice:
        """The entries of a block."""
        return slice(chunks.start * self.chunk, chunks.stop * self.chunk)

    def scales(self, message: np.ndarray) -> np.ndarray:
        """The scales of a message, aliasing it."""
        return message[: 4 * self.n_chunks].view(np.float32)

    def write(self, x_N: np.ndarray, message: np.ndarray, random: np.random.Generator) -> None:
        """Fill `message`.

        Args:
            x_N: float32, `padded` entries, finite; those beyond `n` are 0.
            message: uint8, `message_bytes`.
            random: Draws the u of "qsgd", `padded` of them.
        """
        scales = self.scales(message)
        for chunks in self.blocks():
            x_CK = x_N[self.entries(chunks)].reshape(-1, self.chunk)
            if self.scheme == "sign":
                codes, scale_C = self._signs(x_CK, chunks)
            else:
                codes, scale_C = self._levels(x_CK, random)
            scales[chunks.start : chunks.stop] = scale_C
            self._pack(codes, self._codes(message, chunks))

    def read(self, message: np.ndarray, chunks: range, out_N: np.ndarray) -> None:
        """The entries of one block as everybody reads them.

        Args:
            message: As `write` filled it.
            chunks: One of `blocks`.
            out_N: float32, for this block's entries; those beyond `n` become 0.
        """
        packed = self._codes(message, chunks)
        shift = -1 if self.bits == 1 else -self.top
        table = (np.arange(2**self.bits) * (2 if self.bits == 1 else 1) + shift).astype(np.float32)
        codes = np.empty((8 // self.bits, len(packed)), np.uint8)
        for place, stretch in enumerate(codes):
            np.right_shift(packed, self.bits * place, out=stretch)
        np.bitwise_and(codes, 2**self.bits - 1, out=codes)
        table.take(codes.reshape(-1), out=out_N, mode="clip")
        out_CK = out_N.reshape(-1, self.chunk)
        out_CK *= self.scales(message)[chunks.start : chunks.stop, None]
        out_N[max(0, self.n - chunks.start * self.chunk) :] = 0.0

    def add_up(
        self, messages: np.ndarray, total_N: np.ndarray, own: int, acc_N: np.ndarray
    ) -> bool:
        """Sum what all ranks wrote, in rank order, and take what one wrote off its accumulator.

        Args:
            messages: (ranks, `message_bytes`).
            total_N: float32, `padded` entries; becomes the sum.
            own: Row of the message whose entries are taken off.
            acc_N: float32, `padded` entries: what that message was written from.

        Returns:
            Whether no entry can leave the range of float32; else nothing was done.
        """
        bound_C = np.zeros(self.n_chunks)
        for message in messages:
            bound_C += self.scales(message)
        if not (bound_C * self.top < float(np.finfo(np.float32).max)).all():
            return False
        for chunks in self.blocks():
            where = self.entries(chunks)
            read_N = np.empty(where.stop - where.start, np.float32)
            total_N[where] = 0.0
            for rank, message in enumerate(messages):
                self.read(message, chunks, read_N)
                total_N[where] += read_N
                if rank == own:
                    acc_N[where] -= read_N
        return True

    def _signs(self, x_CK: np.ndarray, chunks: range) -> tuple[np.ndarray, np.ndarray]:
        counts = np.full(len(x_CK), self.chunk, np.float32)
        if chunks.stop == self.n_chunks:
            counts[-1] = self.n - (self.n_chunks - 1) * self.chunk
        with np.errstate(over="ignore"):  # an infinite scale is seen by every reader
            scale_C = np.abs(x_CK).sum(axis=1) / counts
        return (x_CK >= 0).view(np.uint8), scale_C

    def _levels(
        self, x_CK: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        magnitude_CK = np.abs(x_CK)
        norm_C = magnitude_CK.max(axis=1)
        magnitude_CK /= np.where(norm_C > 0, norm_C, np.float32(1))[:, None]
        magnitude_CK *= np.float32(self.top)
        level_CK = random.random(x_CK.shape, np.float32)
        level_CK += magnitude_CK
        # The sum may round up to the next integer.
        np.minimum(np.floor(level_CK, out=level_CK), np.float32(self.top), out=level_CK)
        scale_C = norm_C / np.float32(self.top)
        if not self.unbiased:
            length_C = np.einsum("ck,ck->c", level_CK, level_CK)
            along_C = np.einsum("ck,ck->c", level_CK, magnitude_CK)
            scale_C *= along_C / np.maximum(length_C, np.float32(1))
        np.copysign(level_CK, x_CK, out=level_CK)
        level_CK += np.float32(self.top)
        return level_CK.astype(np.uint8), scale_C

    def _codes(self, message: np.ndarray, chunks: range) -> np.ndarray:
        """The bytes of a block's codes, aliasing the message."""
        entries = self.entries(chunks)
        packed = message[4 * self.n_chunks :]
        return packed[entries.start * self.bits // 8 : entries.stop * self.bits // 8]

    def _pack(self, codes_CK: np.ndarray, packed: np.ndarray) -> None:
        stretches = codes_CK.reshape(8 // self.bits, -1)
        packed[:] = stretches[0]
        for place, stretch in enumerate(stretches[1:], start=1):
            packed |= stretch << np.uint8(self.bits * place)
