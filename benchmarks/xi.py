"""xi of Alistarh et al. 2018 (arXiv 1809.10505) along training by their Algorithm 1, on 4 nodes.

    acc_i = residual_i + lr g_i;  sent_i = TopK(acc_i);  x <- x - mean_i(sent_i)
    xi = ||TopK(mean acc) - mean TopK(acc)|| / ||lr mean g||

k is the density times n, rounded up. Run from benchmarks/density.py.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.logistic import L2, Logistic

NODES = 4
DENSITIES = [0.1, 0.01, 0.001]


def xi_along(
    gradient: Callable[[np.ndarray, int], np.ndarray], x_N: np.ndarray, lr: float, steps: int
) -> dict[str, Any]:
    """Trains by Algorithm 1 of Alistarh et al. at each density; `gradient(x, node)` is random."""
    result = {}
    n = len(x_N)
    for density in DENSITIES:
        count = int(np.ceil(density * n))
        x, residual, found = x_N.copy(), np.zeros((NODES, n), x_N.dtype), []
        for _ in range(steps):
            fresh = lr * np.stack([gradient(x, node) for node in range(NODES)])
            acc = residual + fresh
            sent = top(acc, count)
            residual = acc - sent
            x -= sent.mean(0)
            difference = np.linalg.norm(top(acc.mean(0)[None], count)[0] - sent.mean(0))
            found.append(float(difference / np.linalg.norm(fresh.mean(0))))
        low, median, high, most = np.percentile(found, [5, 50, 95, 100]).round(4).tolist()
        result[str(density)] = {"count": count, "median": median, "5 %": low, "95 %": high,
                                "max": most}  # fmt: skip
        print("xi", n, density, result[str(density)], file=sys.stderr, flush=True)
    return result


def top(rows: np.ndarray, count: int) -> np.ndarray:
    """Each row with its `count` largest magnitudes kept, the rest zero."""
    places = np.argpartition(np.abs(rows), -count, axis=1)[:, -count:]
    kept = np.zeros_like(rows)
    np.put_along_axis(kept, places, np.take_along_axis(rows, places, 1), 1)
    return kept


def xi_w8a(problem: Logistic, batch: int = 64, lr: float = 0.5, steps: int = 1000) -> Any:
    rng = np.random.default_rng(0)

    def gradient(x: np.ndarray, node: int) -> np.ndarray:
        rows = problem.shards[node]
        rows = rows[rng.integers(0, rows.shape[0], batch)]
        return np.asarray(L2 * x - rows.T @ (1 / (1 + np.exp(rows @ x))) / batch)

    measured = xi_along(gradient, np.zeros(problem.n), lr, steps)
    return {"n": problem.n, "batch": batch, "lr": lr, "steps": steps, "xi": measured}


def xi_mnist(folder: Path, batch: int = 64, lr: float = 0.1, steps: int = 500) -> Any:
    """A perceptron with one hidden layer of 128."""
    import torch
    from torch import nn

    arrays = []
    for name, start in (("images-idx3", 16), ("labels-idx1", 8)):
        packed = (folder / "mnist" / f"train-{name}-ubyte.gz").read_bytes()
        arrays.append(np.frombuffer(gzip.decompress(packed), np.uint8, offset=start))
    images = torch.tensor(arrays[0].reshape(-1, 784)).float() / 255
    labels = torch.tensor(arrays[1]).long()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    parameters = list(model.parameters())
    vector = nn.utils.parameters_to_vector(parameters).detach().numpy()

    def gradient(x: np.ndarray, node: int) -> np.ndarray:
        nn.utils.vector_to_parameters(torch.from_numpy(x), parameters)
        rows = node + NODES * torch.from_numpy(rng.integers(0, len(labels) // NODES, batch))
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        found = torch.autograd.grad(loss, parameters)
        return torch.cat([g.reshape(-1) for g in found]).numpy()

    measured = xi_along(gradient, vector.copy(), lr, steps)
    return {"n": len(vector), "batch": batch, "lr": lr, "steps": steps, "xi": measured}
