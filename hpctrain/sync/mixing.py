"""Mixing matrices of gossip: who takes how much of whom. Pure.

    W[i, j] = what replica i takes of replica j; rows and columns sum to 1, entries are not negative

    ring         1/3 each of itself and its two neighbours
    grid         a torus of rows x columns, as square as the number allows; Metropolis weights
    exponential  equal parts of itself and of those 1, 2, 4, ... places further on
    one_peer     at step t one half each of itself and of the one 2^(t mod ceil(log2 M)) further on
    full         1/M of everybody: exact averaging

Metropolis: W[i, j] = 1 / (1 + max(degree i, degree j)) for neighbours, the rest for itself. With a
power of two replicas log2(M) steps of one_peer are an exact average.

Source: Xiao, Boyd, Kim 2007 (Metropolis weights); Ying et al. 2021, arXiv 2110.13363 (one-peer
exponential graphs); topologies as in Zhu et al. 2023, arXiv 2306.02913, whose grid has borders.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Graph = Literal["ring", "grid", "exponential", "one_peer", "full"]


def mixing_matrix(graph: Graph, size: int, step: int = 0) -> np.ndarray:
    """(size, size) float64, doubly stochastic. Local.

    Args:
        graph: Which.
        size: Number of replicas.
        step: Counts meetings from 0; only "one_peer" depends on it.
    """
    if graph == "full":
        return np.full((size, size), 1.0 / size)
    if graph == "one_peer":
        hops = [2 ** (step % max(1, math.ceil(math.log2(size))))]
        return _further_on(size, hops)
    if graph == "exponential":
        return _further_on(size, [2**k for k in range(math.ceil(math.log2(size)))])
    rows = 1
    if graph == "grid":
        rows = max(r for r in range(1, math.isqrt(size) + 1) if size % r == 0)
    columns = size // rows
    linked = np.zeros((size, size), bool)
    for i in range(size):
        row, column = divmod(i, columns)
        linked[i, ((row + 1) % rows) * columns + column] = True
        linked[i, row * columns + (column + 1) % columns] = True
    linked |= linked.T
    np.fill_diagonal(linked, val=False)
    return _metropolis(linked)


def check_mixing(matrix: np.ndarray) -> None:
    """Refuse a matrix under which the mean of all replicas would move. Local.

    Raises:
        ValueError: not square, a negative entry, or a row or column that does not sum to 1.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a mixing matrix is square; got shape {matrix.shape}")
    if (matrix < 0).any():
        i, j = np.argwhere(matrix < 0)[0]
        raise ValueError(f"entry [{i}, {j}] = {matrix[i, j]:g} of the mixing matrix is negative")
    for name, sums in (("row", matrix.sum(1)), ("column", matrix.sum(0))):
        wrong = np.flatnonzero(np.abs(sums - 1.0) > 1e-6)
        if wrong.size:
            raise ValueError(
                f"{name} {wrong[0]} of the mixing matrix sums to {sums[wrong[0]]:g}; rows and "
                "columns must sum to 1, or the mean of the replicas would move"
            )


def _further_on(size: int, hops: list[int]) -> np.ndarray:
    matrix = np.eye(size)
    for hop in hops:
        matrix += np.roll(np.eye(size), hop, axis=1)
    return matrix / (1 + len(hops))


def _metropolis(linked: np.ndarray) -> np.ndarray:
    degrees = linked.sum(1)
    matrix = np.where(linked, 1.0 / (1.0 + np.maximum.outer(degrees, degrees)), 0.0)
    np.fill_diagonal(matrix, 1.0 - matrix.sum(1))
    return matrix
