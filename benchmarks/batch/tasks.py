"""The trainings and the methods that `benchmarks.batch_policies` compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Tree = dict[str, Any]

RANKS = 4
START = 8 * RANKS
"""The start batch: 8 samples per rank; step sizes are chosen at it."""
CAP = 4096
"""No method takes a larger batch."""
SEEDS = (0, 1, 2)
TUNING_SEED = 7
"""Step sizes are chosen on it, and it is not compared."""


@dataclass(frozen=True)
class Task:
    """One training up to a target."""

    title: str
    tables: Tree
    """An hpctrain configuration without seed, [lr] and [batch]."""
    samples_per_epoch: int
    epochs: int
    """The sample budget: what the start batch has reached by then is the target."""
    every_epochs: float
    """Between two evaluations."""
    lrs: tuple[float, ...]
    """The grid for the start batch; the step size of other batches is in proportion."""
    sizes: tuple[int, ...]
    """The sweep over fixed batches, START among them."""
    final: Tree = field(default_factory=dict)
    """Tables that differ in the trainings whose final accuracy is compared."""

    @property
    def budget(self) -> int:
        """In samples."""
        return self.epochs * self.samples_per_epoch

    @property
    def span(self) -> float:
        """Samples over which losses are averaged."""
        return WINDOW * self.every_epochs * self.samples_per_epoch


WINDOW = 5
"""Evaluations apart: the span of samples over which losses are averaged."""
SWEEP = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

TASKS = {
    "convex": Task(
        title="logistic regression, n = 20,000, d = 512, label noise 0.1; SGD",
        tables={
            "data": {
                "kind": "synthetic",
                "task": "logistic",
                "n_train": 20_000,
                "n_test": 5_000,
                "features": 512,
                "noise": 0.35,  # flips 10 % of the teacher's labels
            },
            "model": {"kind": "logistic"},
            "optimiser": {"kind": "sgd"},
        },
        samples_per_epoch=20_000,
        epochs=10,
        every_epochs=0.1,
        lrs=(0.01, 0.02, 0.04, 0.08),
        sizes=SWEEP,
    ),
    "nonconvex": Task(
        title="ReLU network 48-96-10 on a tanh teacher, n = 20,000, label noise 0.1, l2 term 1e-3; "
        "SGD",
        tables={
            "data": {
                "kind": "synthetic",
                "task": "mlp",
                "n_train": 20_000,
                "n_test": 5_000,
                "features": 48,
                "outputs": 10,
                "noise": 0.055,  # flips 10 % of the teacher's labels
            },
            "model": {"kind": "mlp", "widths": [96]},
            "optimiser": {"kind": "sgd", "weight_decay": 1e-3},
        },
        samples_per_epoch=20_000,
        epochs=10,
        every_epochs=0.1,
        lrs=(0.0125, 0.025, 0.05, 0.1),
        sizes=SWEEP,
    ),
    "fashion": Task(
        title="Fashion-MNIST, the first 8,000 images, CNN of configs/fashion-cnn.toml; SGD with "
        "Nesterov momentum 0.9",
        tables={
            "data": {
                "kind": "idx",
                "folder": "fashion-mnist",
                "limit_train": 8_000,
                "limit_test": 1_000,
            },
            "model": {"kind": "cnn", "channels": [32, 64], "hidden": 128},
            "optimiser": {
                "kind": "sgd",
                "momentum": 0.9,
                "nesterov": True,
                "weight_decay": 5e-4,
            },
        },
        samples_per_epoch=8_000,
        epochs=5,
        every_epochs=0.1,
        lrs=(0.005, 0.01, 0.02, 0.04),
        sizes=(32, 64, 128, 256, 512, 1024),
        final={"data": {"kind": "idx", "folder": "fashion-mnist", "limit_train": 8_000}},
    ),
    "a9a": Task(
        title="a9a, logistic regression with l2 term 1e-4 of configs/a9a-logistic.toml; SGD",
        tables={
            "data": {
                "kind": "libsvm",
                "train": "libsvm/a9a.bz2",
                "test": "libsvm/a9a.t.bz2",
                "n_features": 123,
            },
            "model": {"kind": "logistic"},
            "optimiser": {"kind": "sgd", "weight_decay": 1e-4},
        },
        samples_per_epoch=32_561,
        epochs=6,
        every_epochs=0.06,
        lrs=(0.02, 0.05, 0.1, 0.2),
        sizes=SWEEP,
    ),
}


@dataclass(frozen=True)
class Method:
    """One way to choose the batch."""

    family: str
    """fixed, AdaBatch, DiveBatch or hpctrain."""
    batch: Tree
    """The table [batch]."""
    lr: Mapping[str, Any] = field(default_factory=lambda: LINEAR)
    """The table [lr] without its base."""

    @property
    def ranks(self) -> int:
        """As many as it takes: one where a step depends on nothing but its whole batch."""
        return 1 if self.batch["kind"] in ("fixed", "adabatch") else RANKS

    @property
    def timed(self) -> bool:
        """Whether its decisions depend on the times of steps."""
        return bool(self.batch["kind"] == "goodput")


LINEAR = {"kind": "linear", "reference_batch": START}
FIXED_START = f"fixed {START}"


def growing(kind: str, ranks: int = RANKS, **keys: Any) -> Tree:
    """A table [batch] that begins at START. Every share goes in one pass, as with fixed batches."""
    bounds = {"batch_global": START, "batch_max": CAP, "micro_batch": CAP // ranks}
    return {"kind": kind} | bounds | keys


def methods(task: Task) -> dict[str, Method]:
    """Everything that is compared on a task."""
    found = {
        f"fixed {size}": Method("fixed", {"kind": "fixed", "batch_global": size})
        for size in task.sizes
    }
    for parts in (20, 10, 5):
        period = task.epochs / parts
        batch = growing("adabatch", 1, every_epochs=period, lr_factor=1.0)
        found[f"AdaBatch, {parts} periods"] = Method("AdaBatch", batch)
    batch = growing("adabatch", 1, every_epochs=task.epochs / 10)
    found["AdaBatch as published"] = Method("AdaBatch", batch, {"kind": "none"})
    for epochs in (1, 2, 3):
        batch = growing("divebatch", resize_every=epochs, delta=0.1)
        found[f"DiveBatch, every {epochs}"] = Method("DiveBatch", batch)
    batch = growing("divebatch", resize_every=1, delta=0.1)
    found["DiveBatch as published"] = Method("DiveBatch", batch, {"kind": "none"})
    found["goodput"] = Method("goodput", growing("goodput"))
    return found
