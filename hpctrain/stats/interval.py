"""Intervals for the ratio of two means of steps, each step with a weight.

Steps are cut into blocks of about equal weight: neighbours may depend on each other, and a block's
mean is nearer to normal than a step's. The interval is Fieller's: all r with

    |N - r D| <= t * sd(N - r D),   t = the 95 % quantile of Student's t

N, D        weighted means of the numerator and of the denominator
sd          from the scatter of the blocks' means, in which both are uncertain, and together

Where D stands out from zero this is a 90 % interval. Where it does not, the set has no upper end,
and its lower end is a one-sided 95 % bound.

Source: Fieller 1954, "Some problems in interval estimation", J. R. Stat. Soc. B 16. Difference: a
ratio that cannot be negative is bounded as if a negative D were zero; the bound is then lower.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Places = NDArray[np.int64]

BLOCKS = 16
"""Of a window of steps; even, so that halves can be compared."""

_T_95 = [6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782]
_T_95 += [1.771, 1.761, 1.753]
_FREEDOM = list(range(1, len(_T_95) + 1))
"""Student's t: its 95 % quantile by degrees of freedom, 1 to BLOCKS - 1."""


@dataclass(frozen=True)
class Ratio:
    """One ratio per window of steps; every field is (windows,)."""

    top: Array
    """N."""
    bottom: Array
    """D."""
    low: Array
    """Lower end, at least 0."""
    high: Array
    """Upper end; inf where not resolved."""
    resolved: NDArray[np.bool_]
    """Whether D stands out from zero."""
    error: Array
    """t * sd(D) / N: what the reciprocal of the ratio is known within."""
    shift: Array
    """Natural logarithm of the ratio: newer half of the window less older half, where it stands
    out of its scatter; see `shift_of`."""


def ratio_of(weight_n: Array, top_n: Array, bottom_n: Array, starts: Places) -> Ratio:
    """Ratios of weighted means over windows that end with the last step. Local, pure.

    Args:
        weight_n: (n,) not negative, and not all zero within a window.
        top_n: (n,) the numerator by step.
        bottom_n: (n,) the denominator.
        starts: (windows,) the first step of each.
    """
    edges = cut(weight_n, starts)
    weight, top, bottom = (
        np.diff(np.concatenate([[0.0], np.cumsum(x)])[edges], axis=1)
        for x in (weight_n, weight_n * top_n, weight_n * bottom_n)
    )
    total = weight.sum(1, keepdims=True)
    return fieller(weight / total, top / total, bottom / total)


def cut(weight_n: Array, starts: Places) -> Places:
    """Where the blocks of each window begin and end: (windows, BLOCKS + 1). Local, pure.

    A step is never divided: where few steps carry the weight, some blocks are empty.
    """
    reached = np.concatenate([[0.0], np.cumsum(weight_n)])
    first = reached[starts][:, None]
    wanted = first + (reached[-1] - first) * (np.arange(BLOCKS + 1) / BLOCKS)
    edges: Places = np.searchsorted((reached[1:] + reached[:-1]) / 2, wanted)
    np.maximum(edges, starts[:, None], out=edges)  # steps without weight stand where the last did
    edges[:, 0], edges[:, -1] = starts, len(weight_n)
    return edges


def fieller(share: Array, top: Array, bottom: Array) -> Ratio:
    """Ratios and intervals from blocks. Local, pure.

    Args:
        share: (windows, BLOCKS) weights of the blocks, of sum 1; 0 for an empty one.
        top: (windows, BLOCKS) share times the block's mean of the numerator.
        bottom: The same of the denominator.
    """
    n, d = top.sum(1), bottom.sum(1)
    off_n, off_d = top - share * n[:, None], bottom - share * d[:, None]
    blocks = 1.0 / (share * share).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t2 = np.interp(blocks - 1.0, _FREEDOM, _T_95) ** 2 * blocks / (blocks - 1.0)
        v_nn, v_nd, v_dd = (
            t2 * (x * y).sum(1) for x, y in ((off_n, off_n), (off_n, off_d), (off_d, off_d))
        )
        resolved = (d > 0.0) & (d * d > v_dd)
        floor = np.maximum(d, 0.0)
        a, b, c = floor * floor - v_dd, n * floor - v_nd, n * n - v_nn
        far = b + np.sqrt(np.maximum(b * b - a * c, 0.0))
        low = np.where((c > 0.0) & (far > 0.0), c / far, 0.0)
        high = np.where(resolved, np.maximum(far, 0.0) / a, np.inf)
        shift = np.where(
            resolved & (n > 0.0), shift_of(share, top / n[:, None] - bottom / d[:, None]), 0.0
        )
        error = np.where(n > 0.0, np.sqrt(v_dd) / n, np.inf)
    return Ratio(n, d, low, high, resolved, np.nan_to_num(error, nan=np.inf), np.nan_to_num(shift))


def shift_of(share: Array, log_ratio: Array) -> Array:
    """How much further the newer half of a window is than the older half. Local, pure.

    The difference x of the halves' means, shrunk by its noise: x (1 - v / x²), 0 where v > x²;
    v, the variance of the window's own mean, comes from the scatter inside the halves.

    Args:
        share: (windows, BLOCKS) as of `fieller`.
        log_ratio: (windows, BLOCKS) share times the block's deviation of the logarithm of the ratio
            (to first order: that of the numerator less that of the denominator).
    """
    half = BLOCKS // 2
    halves = share.reshape(-1, 2, half), log_ratio.reshape(-1, 2, half)
    means = halves[1].sum(2) / halves[0].sum(2)
    off = halves[1] - halves[0] * means[:, :, None]
    blocks = 1.0 / (share * share).sum(1)
    v = (off * off).sum((1, 2)) * blocks / np.maximum(blocks - 2.0, 0.0)
    x = means[:, 1] - means[:, 0]
    shrunk: Array = x * np.maximum(1.0 - v / (x * x), 0.0)
    return shrunk
