"""What a data set is to the other rooms: samples by number, and what they ask of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hpctrain.transport.communicator import SharedWindow

Task = Literal["classification", "language", "regression"]


@dataclass(frozen=True)
class Spec:
    """Shapes and types of one sample, without the batch dimension."""

    task: Task
    input_shape: tuple[int, ...]
    """One sample's inputs: (features,), (channels, height, width) or, for language, (context,)."""
    input_dtype: Literal["float32", "int64"]
    n_outputs: int
    """Number of classes, size of the vocabulary, or length of a regression target."""


class Samples(Protocol):
    """Numbered samples of one split. Every method is local."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored samples: one copy per node."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """Inputs (B, *input_shape) and targets of these samples, in fresh memory.

        A pure function of (indices, epoch): a sample comes out bitwise equal in whatever batch and
        on whatever rank. Augmentation, if any, happens here. Inputs are float32 or int64; targets
        are int64 (B,) for classification, int64 (B, context) for language and float32 (B, outputs)
        for regression.
        """
        ...

    def labels(self) -> np.ndarray | None:
        """Each sample's class, (n,) integers; None where the task has none."""
        ...


@dataclass
class DataSets:
    """The training set, the held-out set and what they ask of a model."""

    train: Samples
    test: Samples
    spec: Spec
    truth: dict[str, np.ndarray] = field(default_factory=dict)
    """Synthetic sets: the teacher's parameters. Empty for the others."""
    windows: list[SharedWindow] = field(default_factory=list)
    """Shared memory behind the samples."""

    @property
    def nbytes(self) -> int:
        """Bytes of both splits: one copy per node."""
        return self.train.nbytes + self.test.nbytes

    def close(self) -> None:
        """Collective over the node. Free the shared memory; no sample may be read afterwards."""
        windows, self.windows = self.windows, []
        for window in windows:
            window.close()
