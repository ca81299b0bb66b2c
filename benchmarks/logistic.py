"""w8a by regularised logistic regression, its rows dealt to nodes, its minimum found by Newton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.data.libsvm_text import read_examples

L2 = 1e-4


@dataclass
class Logistic:
    """Regularised logistic regression whose rows are dealt to nodes."""

    shards: list[Any]
    """(rows, n) sparse, every row times its label."""

    def __post_init__(self) -> None:
        from scipy.sparse import vstack

        self.turned = [shard.T.tocsr() for shard in self.shards]
        self.n = self.shards[0].shape[1]
        rows = vstack(self.shards).tocsr()
        gram = (rows.T @ rows).toarray() / rows.shape[0]
        self.smoothness = float(np.linalg.eigvalsh(gram)[-1] / 4 + L2)
        x = np.zeros((self.n, 1))
        for _ in range(50):
            chance = 1.0 / (1.0 + np.exp(rows @ x))
            gradient = L2 * x - rows.T @ chance / rows.shape[0]
            hessian = (rows.multiply(chance * (1 - chance)).T @ rows).toarray() / rows.shape[0]
            x -= np.linalg.solve(hessian + L2 * np.eye(self.n), gradient)
        self.residual_gradient = float(np.linalg.norm(gradient))
        self.least = float(self.gradients(x)[1][0])
        self.gap_at_zero = float(np.log(2.0) - self.least)

    def gradients(self, x_NB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(nodes, B, n) gradients of each node's mean loss at B points, and the B losses."""
        found, losses = [], []
        for shard, turned in zip(self.shards, self.turned, strict=True):
            power = np.exp(-(shard @ x_NB))
            found.append((L2 * x_NB - turned @ (power / (1 + power)) / shard.shape[0]).T)
            losses.append(np.log1p(power).mean(0))
        return np.stack(found), np.mean(losses, 0) + L2 / 2 * (x_NB * x_NB).sum(0)


def read_w8a(folder: Path, nodes: int) -> list[Any]:
    examples = read_examples(folder / "libsvm" / "w8a.bz2", first_index=1, n_features=None)
    signs = np.sign(examples.labels)
    rows = examples.rows.astype(np.float64).multiply(signs[:, None]).tocsr()
    return [rows[node : len(signs) // 4 * 4 : nodes] for node in range(nodes)]
