"""Closed forms of B_S for generalised linear models, f_i(w) = l_i(x_i . w).

The gradient of sample i is r_i x_i with the residual r_i = l_i'(x_i . w), so everything follows
from the features and one number per sample. Bounds that hold whatever the residuals are

    B_S >= n min_i |x_i|² / sigma_max(X)²                    attained: r along the top left singular
                                                             vector of X, rows of equal length
    n d / (sqrt(n) + sqrt(d))²                               the same for random features, in order
                                                             min(n, d)
    B_S >= n / (rho + 1)                                     rho: largest degree of the graph that
                                                             joins samples which share a feature

are far from what residuals in practice give: they tell about data, a measurement about training.

Source: D. Yin et al., AISTATS 2018, arXiv 1706.05699, section 4 (generalised linear functions,
random and sparse features). Constants derived anew; tests/unit/test_glm.py checks them.
"""

from __future__ import annotations

import math

import numpy as np


def b_s(x_ND: np.ndarray, residual_N: np.ndarray) -> float:
    """B_S of a generalised linear model: n sum r_i² |x_i|² / |X' r|². Local, pure.

    Args:
        x_ND: Features, (n, d).
        residual_N: l_i'(x_i . w), (n,).

    Returns:
        inf where the gradients cancel.
    """
    x, r = np.asarray(x_ND, np.float64), np.asarray(residual_N, np.float64)
    gradient_D = x.T @ r
    length_sq = float(gradient_D @ gradient_D)
    sum_sq = float(r**2 @ (x**2).sum(1))
    return len(x) * sum_sq / length_sq if length_sq else math.inf


def feature_bound(x_ND: np.ndarray) -> float:
    """The least B_S that any residuals can have, for features (n, d). Local, pure."""
    x = np.asarray(x_ND, np.float64)
    return len(x) * float((x**2).sum(1).min()) / float(np.linalg.norm(x, 2)) ** 2


def worst_residuals(x_ND: np.ndarray) -> np.ndarray:
    """Residuals that attain `feature_bound` where all rows are equally long, (n,). Local, pure."""
    left, _, _ = np.linalg.svd(np.asarray(x_ND, np.float64), full_matrices=False)
    top_N: np.ndarray = left[:, 0]
    return top_N


def random_feature_bound(samples: int, features: int) -> float:
    """What `feature_bound` comes to for independent entries of variance 1. Local, pure."""
    n, d = samples, features
    return n * d / (math.sqrt(n) + math.sqrt(d)) ** 2


def conflicts(x_ND: np.ndarray) -> int:
    """rho: with how many others the busiest sample shares a feature that is not 0. Local, pure.

    (n, n) numbers are held at once.
    """
    used = (np.asarray(x_ND) != 0).astype(np.float32)
    shared = used @ used.T > 0
    np.fill_diagonal(shared, False)
    return int(shared.sum(1).max())


def conflict_bound(x_ND: np.ndarray) -> float:
    """The bound n / (rho + 1): the least B_S for features that are mostly 0. Local, pure."""
    return len(x_ND) / (conflicts(x_ND) + 1.0)
