"""The point of least norm in the convex hull of some vectors, from their inner products. Pure.

Source: Frank-Wolfe with exact line search as used for multiple objectives by Sener and Koltun 2018,
arXiv 1810.04650, algorithm 2; started at the best pair.
"""

from __future__ import annotations

import numpy as np


def min_norm_weights(gram_MM: np.ndarray, tolerance: float = 1e-5, most: int = 1000) -> np.ndarray:
    """(M,) weights w >= 0 of sum 1 that minimise |sum of w_i v_i|. Local, deterministic.

    Args:
        gram_MM: (M, M) float64, inner products of the vectors.
        tolerance: Stop when the weights change by less, summed.
        most: Iterations at most.
    """
    size = len(gram_MM)
    weights = np.zeros(size)
    best = (np.inf, 0, 0, 1.0)
    for i in range(size):
        for j in range(i, size):
            share = _share(gram_MM[i, i], gram_MM[i, j], gram_MM[j, j])
            square = (
                share**2 * gram_MM[i, i]
                + 2.0 * share * (1.0 - share) * gram_MM[i, j]
                + (1.0 - share) ** 2 * gram_MM[j, j]
            )
            best = min(best, (square, i, j, share))
    _, i, j, share = best
    weights[i] += share
    weights[j] += 1.0 - share
    for _ in range(most):
        products = gram_MM @ weights
        vertex = int(products.argmin())
        share = _share(float(weights @ products), float(products[vertex]), gram_MM[vertex, vertex])
        after = share * weights
        after[vertex] += 1.0 - share
        moved = np.abs(after - weights).sum()
        weights = after
        if moved < tolerance:
            break
    return weights


def _share(aa: float, ab: float, bb: float) -> float:
    """The share of a, in [0, 1], for which |share * a + (1 - share) * b| is least."""
    if ab >= aa:
        return 1.0
    if ab >= bb:
        return 0.0
    return (bb - ab) / (aa + bb - 2.0 * ab)
