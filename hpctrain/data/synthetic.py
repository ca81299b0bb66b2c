"""Teacher tasks with known answers: random inputs, targets made by a known function of them.

    x ~ N(0, I)
    linear:    y = W·x + b + noise·N(0, I)                          regression
    logistic:  y = argmax(W·x + b + noise·Gumbel)                    classification
    mlp:       y = argmax(V·tanh(W·x + b) + noise·Gumbel)            classification

With noise = 1 the logistic teacher is the softmax model itself, P(y) = softmax(W·x + b); with noise
= 0 labels are certain. The best possible loss of `linear` is ½·noise²·outputs. Entries of W and V
have variance 1 / (number of inputs they see), times scale².
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from hpctrain.data.arrays import ArraySamples
from hpctrain.data.seeding import Purpose, generator
from hpctrain.data.share import Survey, load_once
from hpctrain.data.source import Source, at_most
from hpctrain.data.spec import DataSets, Spec
from hpctrain.transport.communicator import Communicator

_BLOCK_ROWS = 1024
_HIDDEN = 64
_SPLITS = ("train", "test")


class Synthetic(Source):
    """[data] kind = "synthetic": nothing is read; `DataSets.truth` holds the teacher."""

    kind: Literal["synthetic"] = "synthetic"
    """The source."""
    task: Literal["linear", "logistic", "mlp"] = "logistic"
    """The teacher."""
    n_train: int = Field(default=8192, ge=1)
    """Training samples."""
    n_test: int = Field(default=2048, ge=1)
    """Held-out samples."""
    features: int = Field(default=32, ge=1)
    """Length of an input."""
    outputs: int = Field(default=2, ge=1)
    """Classes, or for linear the length of a target."""
    noise: float = Field(default=0.1, ge=0)
    """Strength of the noise in the targets."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the teacher's weights."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the mlp teacher's hidden layer, by default 64; the other teachers have none."""
    teacher_seed: int = Field(default=0, ge=0, lt=2**32)
    """Of teacher and samples; the run's seed leaves them alone, so that runs can be compared."""

    @model_validator(mode="after")
    def _fits(self) -> Synthetic:
        if self.task != "linear" and self.outputs < 2:
            raise ValueError(f'task = "{self.task}" has at least 2 classes; got outputs = 1')
        if self.task != "mlp" and self.hidden is not None:
            raise ValueError(f'hidden belongs to task = "mlp"; got task = "{self.task}"')
        return self

    def _has_labels(self) -> bool:
        return self.task != "linear"

    def load(self, node: Communicator, seed: int) -> DataSets:
        """Collective over the node. `seed` plays no part, see `teacher_seed`."""
        shared = load_once(node, self._survey)
        splits = [
            ArraySamples(shared.arrays[f"{split}_inputs"], shared.arrays[f"{split}_targets"])
            for split in _SPLITS
        ]
        spec = Spec(
            "regression" if self.task == "linear" else "classification",
            (self.features,),
            "float32",
            self.outputs,
        )
        return DataSets(splits[0], splits[1], spec, self.teacher(), shared.windows)

    def teacher(self) -> dict[str, np.ndarray]:
        """W (outputs or hidden, features), b, and for mlp V (outputs, hidden); float64. Local."""
        rng = generator(Purpose.TEACHER, self.teacher_seed)
        hidden = self.hidden or _HIDDEN
        rows = hidden if self.task == "mlp" else self.outputs
        weights = rng.standard_normal((rows, self.features)) * self.scale / self.features**0.5
        truth = {"W": weights, "b": rng.standard_normal(rows) * self.scale}
        if self.task == "mlp":
            weights = rng.standard_normal((self.outputs, hidden)) * self.scale
            truth["V"] = weights / hidden**0.5
        return truth

    def _survey(self) -> Survey:
        counts = {
            "train": at_most(self.n_train, self.limit_train),
            "test": at_most(self.n_test, self.limit_test),
        }
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
        for split, count in counts.items():
            shapes[f"{split}_inputs"] = ((count, self.features), np.float32)
            linear = self.task == "linear"
            target: tuple[tuple[int, ...], Any] = (
                ((count, self.outputs), np.float32) if linear else ((count,), np.int64)
            )
            shapes[f"{split}_targets"] = target

        def fill(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
            truth = self.teacher()
            for number, split in enumerate(_SPLITS):
                inputs, targets = arrays[f"{split}_inputs"], arrays[f"{split}_targets"]
                for block, start in enumerate(range(0, counts[split], _BLOCK_ROWS)):
                    # A block has its own stream: a limited set is the beginning of the whole one.
                    rng = generator(Purpose.EXAMPLES, self.teacher_seed, number, block)
                    rows = inputs[start : start + _BLOCK_ROWS]
                    rng.standard_normal(dtype=np.float32, out=rows)
                    targets[start : start + _BLOCK_ROWS] = self._answer(rows, truth, rng)
            return {}

        return Survey(shapes, fill)

    def _answer(
        self, inputs_BF: np.ndarray, truth: dict[str, np.ndarray], rng: np.random.Generator
    ) -> np.ndarray:
        values = inputs_BF.astype(np.float64) @ truth["W"].T + truth["b"]
        if self.task == "linear":
            noisy: np.ndarray = values + self.noise * rng.standard_normal(values.shape)
            return noisy
        if self.task == "mlp":
            values = np.tanh(values) @ truth["V"].T
        labels: np.ndarray = np.argmax(values + self.noise * rng.gumbel(size=values.shape), axis=1)
        return labels
