"""Texts as arrays of tokens: reading, the vocabulary of characters, windows of context."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpctrain.data.files import Stream
from hpctrain.data.seeding import Purpose, generator
from hpctrain.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_CODE_POINTS = 0x110000


@dataclass
class Corpus:
    """A file that was read: its pieces wait to be encoded, and are let go one by one."""

    path: Path
    by_character: bool
    pieces: list[bytes]
    count: int = 0
    """Tokens: bytes or characters."""
    first_seen: dict[int, int] = field(default_factory=dict)
    """Code point -> place of its first occurrence; by characters only."""

    @classmethod
    def read(cls, path: Path, *, by_character: bool) -> Corpus:
        """Read and unpack a whole file; find its characters. Local.

        Raises:
            DataError: the file is corrupt, or not UTF-8 where characters are asked for.
        """
        with Stream(path) as stream:
            corpus = cls(path, by_character, list(stream.chunks()))
        seen = np.zeros(_CODE_POINTS if by_character else 0, bool)
        for codes in corpus._codes(corpus.pieces):
            if by_character:
                before = seen.copy()
                seen[codes] = True
                for new in np.flatnonzero(seen & ~before).tolist():
                    corpus.first_seen[new] = corpus.count + int(np.argmax(codes == new))
            corpus.count += len(codes)
        return corpus

    def release(self) -> Iterator[tuple[int, np.ndarray]]:
        """(place, codes) of each piece, once; its memory is free when the next one comes."""
        place = 0
        for codes in self._codes(_drained(self.pieces)):
            yield place, codes
            place += len(codes)

    def _codes(self, pieces: Iterator[bytes] | list[bytes]) -> Iterator[np.ndarray]:
        """Bytes (uint8) or code points (uint32) of each piece."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = 0
        for piece in pieces:
            pending = len(decoder.getstate()[0])
            if not self.by_character or (pending == 0 and piece.isascii()):
                yield np.frombuffer(piece, np.uint8)
            else:
                try:
                    text = decoder.decode(piece)
                except UnicodeDecodeError as error:
                    raise self._not_utf8(offset - pending + error.start) from error
                yield np.frombuffer(text.encode("utf-32-le"), np.uint32)
            offset += len(piece)
        if decoder.getstate()[0]:
            raise self._not_utf8(offset - len(decoder.getstate()[0]))

    def _not_utf8(self, offset: int) -> DataError:
        return DataError(
            f'{self.path}: not UTF-8 at byte {offset} of the text; use data.tokens = "byte", or '
            "convert the file"
        )


class Codebook:
    """Code point -> token, for a sorted list of code points."""

    def __init__(self, vocabulary: list[int]) -> None:
        self._tokens = np.full(_CODE_POINTS, -1, np.int32)
        self._tokens[vocabulary] = np.arange(len(vocabulary))

    def encode(self, codes: np.ndarray, path: Path, place: int) -> np.ndarray:
        """Tokens of the codes, int32. Local.

        Raises:
            DataError: a character is not in the vocabulary; names it and its place.
        """
        tokens: np.ndarray = self._tokens[codes]
        unknown = np.flatnonzero(tokens < 0)
        if len(unknown):
            code = int(codes[unknown[0]])
            raise DataError(
                f"{path}: character {chr(code)!r} (U+{code:04X}) at character "
                f"{place + int(unknown[0])} does not occur in the training text, so the model has "
                'no token for it; take it out, or use data.tokens = "byte"'
            )
        return tokens


@dataclass(frozen=True)
class TextSamples:
    """Windows of context that do not overlap, a `Samples`.

    With a shift seed, the first window of epoch e starts at a random place of the first `context`
    tokens, so that every epoch cuts the text elsewhere; window i starts i·context later. Inputs are
    a window's tokens, targets the tokens one place further on.

    Args:
        tokens: (n,) uint8 or uint16.
        context: tokens in a window.
        shift_seed: None = all epochs cut at multiples of `context`.
    """

    tokens: np.ndarray
    context: int
    shift_seed: int | None = None

    def __len__(self) -> int:
        spare = 1 if self.shift_seed is None else self.context
        return max(0, (len(self.tokens) - spare) // self.context)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens."""
        return self.tokens.nbytes

    def batch(self, indices: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        starts_B = self.shift(epoch) + indices.astype(np.int64) * self.context
        windows = np.lib.stride_tricks.sliding_window_view(self.tokens, self.context + 1)
        tokens_BT = windows[starts_B]
        inputs_BT = tokens_BT[:, :-1].astype(np.int64, order="C")
        targets_BT = tokens_BT[:, 1:].astype(np.int64, order="C")
        return torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT)

    def labels(self) -> np.ndarray | None:
        return None

    def shift(self, epoch: int) -> int:
        """Where the first window of the epoch starts, 0 to context - 1. Local."""
        if self.shift_seed is None:
            return 0
        rng = generator(Purpose.SHIFT, self.shift_seed, epoch)
        return int(rng.integers(self.context))

    @staticmethod
    def tokens_for(windows: int, context: int, *, shifted: bool) -> int:
        """Tokens from which exactly so many windows are made. Local."""
        return windows * context + (context if shifted else 1)


def _drained(pieces: list[bytes]) -> Iterator[bytes]:
    pieces.reverse()
    while pieces:
        yield pieces.pop()
