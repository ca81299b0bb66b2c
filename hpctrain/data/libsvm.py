"""Sparse examples in LIBSVM text, stored densely: one line is `label index:value index:value ...`.

Source of the format: C.-C. Chang, C.-J. Lin, "LIBSVM: a library for support vector machines", 2011.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from hpctrain.data.arrays import ArraySamples
from hpctrain.data.files import Root, with_endings
from hpctrain.data.libsvm_text import Examples, read_examples
from hpctrain.data.partition import hold_out
from hpctrain.data.share import Survey, load_once
from hpctrain.data.source import Source, at_most
from hpctrain.data.spec import DataSets, Spec
from hpctrain.errors import DataError
from hpctrain.transport.communicator import Communicator

_SHARE = 0.2
"""Held out when neither `test` nor `test_fraction` is given."""
_MOST_CLASSES = 1000
_BLOCK_ROWS = 4096


class Libsvm(Source):
    """[data] kind = "libsvm": classification of feature vectors; any set of labels."""

    kind: Literal["libsvm"] = "libsvm"
    """The source."""
    train: str
    """LIBSVM file, plain or .gz, .bz2, .xz."""
    test: str = ""
    """Held-out file; by default a part of the training file."""
    test_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of each class that is held out (the same under every seed); by default 0.2 without
    `test`."""
    n_features: int | None = Field(default=None, ge=1)
    """Features of an example; by default the highest index in the files."""
    first_index: Literal[0, 1] = 1
    """Index of the first feature."""

    @model_validator(mode="after")
    def _one_held_out_set(self) -> Libsvm:
        if self.test and self.test_fraction is not None:
            raise ValueError("give test or test_fraction, not both")
        return self

    def load(self, node: Communicator, seed: int) -> DataSets:
        """Collective over the node. `seed` plays no part.

        Labels become 0..C-1 in ascending order of their values in the training file.

        Raises:
            DataError: a file is missing, corrupt, has a malformed line, an index beyond
                n_features, or a held-out label that training examples lack.
        """
        shared = load_once(node, self._survey)
        arrays = shared.arrays
        splits = [
            ArraySamples(arrays[f"{split}_inputs"], arrays[f"{split}_labels"])
            for split in ("train", "test")
        ]
        shape = arrays["train_inputs"].shape[1:]
        spec = Spec("classification", shape, "float32", shared.facts["classes"])
        return DataSets(splits[0], splits[1], spec, windows=shared.windows)

    def _survey(self) -> Survey:
        train = self._read("train", self.train)
        values, classes = np.unique(train.labels, return_inverse=True)
        if not 2 <= len(values) <= _MOST_CLASSES:
            raise DataError(
                f"{train.path}: {len(values)} distinct label(s); classification needs 2 to "
                f"{_MOST_CLASSES}"
            )
        if self.test:
            test = self._read("test", self.test)
            rows = {"train": np.arange(len(classes)), "test": np.arange(len(test.labels))}
            files = {"train": (train, classes), "test": (test, _known(test, values, train.path))}
        else:
            fraction = _SHARE if self.test_fraction is None else self.test_fraction
            kept, held = hold_out(classes, len(classes), fraction)
            if not (len(kept) and len(held)):
                raise DataError(
                    f"{train.path}: {len(classes)} example(s) are too few to hold out {fraction:g} "
                    "of each class; name a file with data.test"
                )
            rows = {"train": kept, "test": held}
            files = {"train": (train, classes), "test": (train, classes)}
        rows["train"] = rows["train"][: at_most(len(rows["train"]), self.limit_train)]
        rows["test"] = rows["test"][: at_most(len(rows["test"]), self.limit_test)]
        found = max(file.n_features for file, _ in files.values())
        n_features = self.n_features or found
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
        for split, chosen in rows.items():
            shapes[f"{split}_inputs"] = ((len(chosen), n_features), np.float32)
            shapes[f"{split}_labels"] = ((len(chosen),), np.int64)

        def fill(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
            for split, chosen in rows.items():
                examples, mapped = files[split]
                inputs = arrays[f"{split}_inputs"]
                inputs[:, examples.n_features :] = 0.0
                for start in range(0, len(chosen), _BLOCK_ROWS):
                    block = chosen[start : start + _BLOCK_ROWS]
                    dense = examples.rows[block].toarray()
                    inputs[start : start + len(block), : examples.n_features] = dense
                arrays[f"{split}_labels"][:] = mapped[chosen]
            return {}

        return Survey(shapes, fill, {"classes": len(values)})

    def _read(self, key: str, name: str) -> Examples:
        what = "the training examples" if key == "train" else "the held-out examples"
        path = Root.of(self.root).find(what, with_endings(name), key=key)
        return read_examples(path, first_index=self.first_index, n_features=self.n_features)


def _known(test: Examples, values: np.ndarray, train_path: Path) -> np.ndarray:
    """Classes of the held-out labels."""
    places = np.searchsorted(values, test.labels).clip(max=len(values) - 1)
    bad = np.flatnonzero(values[places] != test.labels)
    if len(bad):
        raise DataError(
            f"{test.path}: line {test.lines[bad[0]]}: label {test.labels[bad[0]]:g} does not occur "
            f"in {train_path}, whose labels are {', '.join(f'{value:g}' for value in values[:20])}"
        )
    return places
