"""Handwritten digits that come with scikit-learn: 1797 images of 8x8 pixels, 10 classes.

Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI machine learning
repository; `sklearn.datasets.load_digits` holds its test part.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from hpctrain.data.arrays import ArraySamples
from hpctrain.data.partition import hold_out
from hpctrain.data.share import Survey, load_once
from hpctrain.data.source import Source, at_most
from hpctrain.data.spec import DataSets, Spec
from hpctrain.transport.communicator import Communicator


class Digits(Source):
    """[data] kind = "digits": needs no download. Pixels scaled to 0 to 1."""

    kind: Literal["digits"] = "digits"
    """The source."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of each class that is held out; the same samples under every seed."""

    def load(self, node: Communicator, seed: int) -> DataSets:
        """Collective over the node. `seed` plays no part."""
        shared = load_once(node, self._survey)
        arrays = shared.arrays
        splits = [
            ArraySamples(arrays[f"{split}_images"], arrays[f"{split}_labels"], std_C=(16.0,))
            for split in ("train", "test")
        ]
        spec = Spec("classification", (1, 8, 8), "float32", 10)
        return DataSets(splits[0], splits[1], spec, windows=shared.windows)

    def _survey(self) -> Survey:
        from sklearn.datasets import load_digits  # takes a second to import: on one rank only

        pixels, labels = load_digits(return_X_y=True)
        train, test = hold_out(labels, len(labels), self.test_fraction)
        rows = {
            "train": train[: at_most(len(train), self.limit_train)],
            "test": test[: at_most(len(test), self.limit_test)],
        }
        shapes: dict[str, Any] = {}
        for split, chosen in rows.items():
            shapes[f"{split}_images"] = ((len(chosen), 1, 8, 8), np.uint8)
            shapes[f"{split}_labels"] = ((len(chosen),), np.uint8)

        def fill(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
            for split, chosen in rows.items():
                arrays[f"{split}_images"][:] = pixels[chosen].reshape(-1, 1, 8, 8)
                arrays[f"{split}_labels"][:] = labels[chosen]
            return {}

        return Survey(shapes, fill)
