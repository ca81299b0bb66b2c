"""Whether ranks hold unlike data: noise between ranks against noise inside them.

With W ranks that each take several micro-batches, s2 has two unbiased estimates from one step:

    between = (sum_r b_r |g_r|² - B |gbar|²) / (W - 1)
    within  = (sum_ra b_ra |g_ra|² - sum_r b_r |g_r|²) / (sum_r K_r - W)

g_ra the mean gradient of micro-batch a of rank r, g_r of the rank, gbar of the step; b_ra,
b_r, B their samples; K_r the micro-batches of rank r. Both are s2 where every rank draws from the
same distribution. Ranks that draw from unlike ones (sorted shards) differ from each other more than
their micro-batches do: then `between` is too large, and so is a B_S that rests on ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpctrain.stats.average import FEWEST, mean_squares
from hpctrain.stats.interval import Array, ratio_of

LIKE = 1.5
"""A ratio up to this is not worth a warning."""


@dataclass(frozen=True)
class DataSkew:
    """Noise between ranks over noise inside them."""

    ratio: float
    """Of averages; 1 for ranks with like data."""
    low: float
    """One-sided 95 % lower bound."""
    skewed: bool
    """Whether even the lower bound is above LIKE."""


def within_ranks(
    micro_weighted_sq: float, rank_weighted_sq: float, micro_batches: float, ranks: float
) -> float:
    """`within` of one step. Local, pure.

    Args:
        micro_weighted_sq: sum_ra b_ra |g_ra|².
        rank_weighted_sq: sum_r b_r |g_r|².
        micro_batches: sum_r K_r.
        ranks: W, those with at least one sample.

    Raises:
        ValueError: no rank has two micro-batches, so nothing is known of the noise inside one.
    """
    if micro_batches <= ranks:
        raise ValueError(
            f"noise inside ranks needs a rank with two micro-batches; got {micro_batches:g} on "
            f"{ranks:g} rank(s)"
        )
    return (micro_weighted_sq - rank_weighted_sq) / (micro_batches - ranks)


def data_skew(between_n: Array, within_n: Array) -> DataSkew | None:
    """The ratio over all given steps, averaged and bounded as B_S is. Local, pure.

    Args:
        between_n: (n,) `between` by step, oldest first.
        within_n: (n,) `within`.

    Returns:
        None below FEWEST steps and where there is no noise inside ranks.
    """
    n = len(within_n)
    if n < FEWEST:
        return None
    square_n, _ = mean_squares(within_n)
    known = square_n > 0.0
    if not known.any():
        return None
    scale_n = np.divide(1.0, square_n, out=np.zeros(n), where=known)
    start = np.array([0])
    found = ratio_of(known.astype(float), between_n * scale_n, within_n * scale_n, start)
    low = float(found.low[0])
    return DataSkew(float(found.top[0] / found.bottom[0]), low, low > LIKE)
