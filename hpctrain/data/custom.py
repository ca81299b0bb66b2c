"""A user's own data: `kind = "package.module:function"`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import Dataset, default_collate

from hpctrain.data.partition import hold_out
from hpctrain.data.source import Source, at_most
from hpctrain.data.spec import DataSets, Spec, Task
from hpctrain.errors import ConfigError, DataError
from hpctrain.transport.communicator import Communicator
from hpctrain.user_code import PATTERN, load_function

if TYPE_CHECKING:
    from torch import Tensor


class CustomData(Source):
    """[data] kind = "package.module:function": the function makes the data set.

    It is called as `function(**args)` on every rank and returns a map-style
    `torch.utils.data.Dataset` of (input, target) pairs, or a pair (train, test) of them. Large data
    should be memory-mapped by the function: what it holds privately exists once per rank.
    """

    kind: Annotated[str, Field(pattern=PATTERN)]
    """Where the function is: a module that Python can import, a colon, the function's name."""
    args: dict[str, Any] = {}
    """Keyword arguments for the function."""
    prefetch: int = Field(default=0, ge=0, le=64)
    """Batches that a background thread makes ahead; 0 = none. Keep 0 if items draw from the global
    random generators: a thread would make such draws unrepeatable."""
    task: Task | None = None
    """By default regression for float targets, classification for single integers, language for
    rows of integers."""
    n_outputs: int | None = Field(default=None, ge=1)
    """Classes, vocabulary or target length; by default the data set's `classes`, else the largest
    label in its `targets` plus 1; the length of a regression target."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share held out where the function returns one data set; the same samples under every seed."""

    def load(self, node: Communicator, seed: int) -> DataSets:
        """Local: every rank calls the user's function. `seed` plays no part.

        Raises:
            ConfigError: the module or function is missing, the arguments do not fit, or what was
                returned is no data set.
            DataError: an item is not an (input, target) pair of numbers.
        """
        train, test = self._call()
        spec = self._describe(train)
        if test is None:
            kept, held = hold_out(None, len(train), self.test_fraction)
            rows = [(train, kept), (train, held)]
        else:
            rows = [(train, np.arange(len(train))), (test, np.arange(len(test)))]
        limits = (self.limit_train, self.limit_test)
        splits = [
            DatasetSamples(dataset, chosen[: at_most(len(chosen), limit)], spec, self.kind)
            for (dataset, chosen), limit in zip(rows, limits, strict=True)
        ]
        for name, samples in zip(("training", "held-out"), splits, strict=True):
            if not len(samples):
                raise DataError(f'data.kind = "{self.kind}": the {name} set is empty')
        return DataSets(splits[0], splits[1], spec)

    def _call(self) -> tuple[Any, Any]:
        made = load_function("data", self.kind, **self.args)(**self.args)
        pair = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        for dataset in pair[: 2 if isinstance(made, tuple) else 1]:
            if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
                raise ConfigError(
                    f'data.kind = "{self.kind}" returned {type(made).__name__}; it must return a '
                    "map-style torch.utils.data.Dataset (with __getitem__ and __len__), or a pair "
                    "(train, test) of them."
                )
        return pair

    def _describe(self, dataset: Any) -> Spec:
        """What the first item tells, and what the keys add."""
        if len(dataset) == 0:
            raise DataError(f'data.kind = "{self.kind}": the training set is empty')
        inputs, targets = collate([_item(dataset, 0, self.kind)], self.kind, (0,))
        real = targets.is_floating_point()
        task: Task = self.task or (
            "regression" if real else "language" if targets.ndim == 2 else "classification"
        )
        expected = {"regression": targets.ndim <= 2 and real, "language": targets.ndim == 2}
        if not expected.get(task, targets.ndim == 1 and not real):
            raise ConfigError(
                f'data.kind = "{self.kind}": targets are {targets.dtype} of shape '
                f'{tuple(targets.shape[1:])}, which do not fit task = "{task}"'
            )
        n_outputs = self.n_outputs
        if n_outputs is None and task == "regression":
            n_outputs = targets[0].numel()
        if n_outputs is None and hasattr(dataset, "classes"):
            n_outputs = len(dataset.classes)
        if n_outputs is None and task == "classification" and hasattr(dataset, "targets"):
            n_outputs = int(torch.as_tensor(dataset.targets).max()) + 1
        if n_outputs is None:
            raise ConfigError(
                f'data.kind = "{self.kind}": the data set has neither `classes` nor `targets`; set '
                "data.n_outputs"
            )
        dtype = "float32" if inputs.is_floating_point() else "int64"
        return Spec(task, tuple(inputs.shape[1:]), dtype, n_outputs)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DatasetSamples:
    """Chosen items of a map-style data set, a `Samples`."""

    dataset: Dataset[Any]
    rows: np.ndarray
    spec: Spec
    kind: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """0: what a user's data set holds is not known."""
        return 0

    def batch(self, indices: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        chosen = self.rows[indices].tolist()
        items = [_item(self.dataset, row, self.kind) for row in chosen]
        inputs, targets = collate(items, self.kind, chosen)
        if self.spec.task == "regression":
            return inputs, targets.view(len(chosen), self.spec.n_outputs)
        bad = torch.nonzero((targets < 0) | (targets >= self.spec.n_outputs))
        if len(bad):
            raise DataError(
                f'data.kind = "{self.kind}": item {chosen[int(bad[0, 0])]} has target '
                f"{int(targets[tuple(bad[0])])}, which is not in 0..{self.spec.n_outputs - 1}; set "
                "data.n_outputs, or correct the data"
            )
        return inputs, targets

    def labels(self) -> np.ndarray | None:
        """Read from the data set's `targets`; without it, from every item."""
        if self.spec.task != "classification":
            return None
        if hasattr(self.dataset, "targets"):
            labels: np.ndarray = np.asarray(self.dataset.targets)[self.rows]
            return labels
        return np.array([int(_item(self.dataset, row, self.kind)[1]) for row in self.rows.tolist()])


def _item(dataset: Any, row: int, kind: str) -> tuple[Any, Any]:
    item = dataset[row]
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise DataError(
            f'data.kind = "{kind}": item {row} is {type(item).__name__}; an item must be a pair '
            "(input, target)"
        )
    return item[0], item[1]


def collate(items: list[tuple[Any, Any]], kind: str, rows: Any) -> tuple[Tensor, Tensor]:
    """Items as two tensors, float32 or int64. Local.

    Raises:
        DataError: they are not numbers, or not of one shape.
    """
    try:
        inputs, targets = default_collate(items)
        parts = [torch.as_tensor(part) for part in (inputs, targets)]
    except (TypeError, RuntimeError, ValueError) as error:
        raise DataError(
            f'data.kind = "{kind}": items {rows[0]} to {rows[-1]} do not make a batch ({error}); '
            "inputs and targets must be numbers, arrays or tensors of one shape"
        ) from error
    inputs, targets = (
        part.float() if part.is_floating_point() else part.to(torch.int64) for part in parts
    )
    return inputs, targets
