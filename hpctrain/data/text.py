"""Language modelling over a text file, by bytes or by characters.

A plain file taken by bytes is mapped into memory; the system reads what is used, and all ranks of a
node share it. Other texts are unpacked and encoded once per node into shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from hpctrain.data.corpus import Codebook, Corpus, TextSamples
from hpctrain.data.files import COMPRESSED, Root, Stream, with_endings
from hpctrain.data.share import Survey, load_once
from hpctrain.data.source import Source, at_most
from hpctrain.data.spec import DataSets, Spec
from hpctrain.errors import DataError
from hpctrain.transport.communicator import Communicator

_SHARE = 0.1
"""Held out when neither `test` nor `test_fraction` is given."""


class Text(Source):
    """[data] kind = "text": windows of `context` tokens, each predicting the next token."""

    kind: Literal["text"] = "text"
    """The source."""
    train: str
    """Text file, plain or .gz, .bz2, .xz."""
    test: str = ""
    """Held-out text file; by default the last part of the training file."""
    test_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training file, at its end, that is held out; by default 0.1 without `test`."""
    tokens: Literal["byte", "char"] = "byte"
    """byte: 256 tokens; char: the distinct characters of the training text (UTF-8), sorted."""
    context: int = Field(default=64, ge=1)
    """Tokens in a window."""

    @model_validator(mode="after")
    def _one_held_out_set(self) -> Text:
        if self.test and self.test_fraction is not None:
            raise ValueError("give test or test_fraction, not both")
        return self

    def _has_labels(self) -> bool:
        return False

    def load(self, node: Communicator, seed: int) -> DataSets:
        """Collective over the node.

        Raises:
            DataError: a file is missing, corrupt, too short or not UTF-8, or the held-out text has
                a character that the training text lacks.
        """
        shared = load_once(node, self._survey)
        parts = {}
        for split in ("train", "test"):
            if split in shared.arrays:
                parts[split] = shared.arrays[split]
            else:
                path, start, stop = shared.facts["mapped"][split]
                parts[split] = np.memmap(path, np.uint8, "r", start, (stop - start,))
        spec = Spec("language", (self.context,), "int64", shared.facts["n_tokens"])
        return DataSets(
            TextSamples(parts["train"], self.context, seed),
            TextSamples(parts["test"], self.context),
            spec,
            windows=shared.windows,
        )

    def _survey(self) -> Survey:
        train = self._open("train", self.train)
        test = self._open("test", self.test) if self.test else None
        parts = {
            "train": self._cut("train", train, 0, train.count if test else self._border(train)),
            "test": self._cut("test", test, 0, test.count)
            if test
            else self._cut("test", train, self._border(train), train.count),
        }
        n_tokens, vocabulary = 256, None
        if isinstance(train, Corpus) and self.tokens == "char":
            stop = parts["train"].stop
            vocabulary = sorted(code for code, first in train.first_seen.items() if first < stop)
            n_tokens = len(vocabulary)
        if n_tokens > 2**16:
            raise DataError(f"{train.path}: {n_tokens} distinct characters; at most 65536 can be")
        dtype = np.uint8 if n_tokens <= 256 else np.uint16
        mapped, shapes = {}, {}
        for split, part in parts.items():
            if isinstance(part.file, _Plain):
                mapped[split] = [str(part.file.path), part.start, part.stop]
            else:
                shapes[split] = ((part.stop - part.start,), dtype)

        def fill(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
            codebook = Codebook(vocabulary) if vocabulary is not None else None
            for corpus in (train, test):
                if isinstance(corpus, Corpus):
                    mine = [
                        (arrays[split], part)
                        for split, part in parts.items()
                        if part.file is corpus
                    ]
                    _encode(corpus, codebook, mine)
            return {}

        return Survey(shapes, fill, {"mapped": mapped, "n_tokens": n_tokens})

    def _open(self, key: str, name: str) -> _Plain | Corpus:
        what = "the training text" if key == "train" else "the held-out text"
        path = Root.of(self.root).find(what, with_endings(name), key=key)
        if self.tokens == "char" or path.suffix in COMPRESSED:
            return Corpus.read(path, by_character=self.tokens == "char")
        with Stream(path) as stream:
            stream.read(1)  # says now, with its name, if the file cannot be read
        return _Plain(path, path.stat().st_size)

    def _border(self, file: _Plain | Corpus) -> int:
        fraction = _SHARE if self.test_fraction is None else self.test_fraction
        return file.count - int(file.count * fraction)

    def _cut(self, split: str, file: _Plain | Corpus, start: int, stop: int) -> _Part:
        """The part of a file that a split takes, as far as its limit lets it."""
        limit = self.limit_train if split == "train" else self.limit_test
        if limit is not None:
            shifted = split == "train"
            wanted = TextSamples.tokens_for(limit, self.context, shifted=shifted)
            stop = start + at_most(stop - start, wanted)
        least = TextSamples.tokens_for(1, self.context, shifted=split == "train")
        if stop - start < least:
            raise DataError(
                f"{file.path}: {stop - start} {self.tokens}s for the {split} part; one window with "
                f"data.context = {self.context} needs {least}. Use a longer text or a shorter "
                "context"
            )
        return _Part(file, start, stop)


@dataclass(frozen=True)
class _Plain:
    """An uncompressed file that is taken by bytes: mapped, not read."""

    path: Path
    count: int


@dataclass(frozen=True)
class _Part:
    file: _Plain | Corpus
    start: int
    stop: int


def _encode(
    corpus: Corpus, codebook: Codebook | None, targets: list[tuple[np.ndarray, _Part]]
) -> None:
    """Write the tokens of each part into its array, letting the text go piece by piece."""
    for place, codes in corpus.release():
        for array, part in targets:
            first, last = max(part.start, place), min(part.stop, place + len(codes))
            if first < last:
                piece = codes[first - place : last - place]
                tokens = piece if codebook is None else codebook.encode(piece, corpus.path, first)
                array[first - part.start : last - part.start] = tokens
