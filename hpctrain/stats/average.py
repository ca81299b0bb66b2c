"""The gradient noise of a run over many steps: B_S with an interval, from single steps' sums.

    B_S = 1 + sum_t w_t s2_t / m_t / sum_t w_t mu2_t / m_t     over a window of the latest steps t
    w_t = B_t (K_t - 1) / K_t
    m_t = mean over the 16 steps before t of s2 + mu2, the mean square of a sample's gradient

A ratio of averages, never an average of ratios: mu2_t is negative in many a single step.

m_t      keeps early, large gradients from outweighing the later ones. It knows only earlier steps,
         so both averages stay unbiased; the first 16 steps, which have none, take the other steps
         of these 16.
B_t, K_t the variance of mu2_t is proportional to K / ((K - 1) B²) far below B_S and to 1 / B far
         above it; the weight stands between the inverses.
window   The last 16, 32, 64, ..., 4096 steps, and all that are remembered. From the shortest on,
         the first whose interval reaches over no more than a factor of NARROW is taken, and if
         there is none, the one with the smallest error of mu2 / s2. A window whose ratio lies
         outside the interval of a shorter one holds steps that no longer apply: it and all longer
         ones are left out.
lag      A window tells of its middle. The difference of its halves, as far as it stands out of
         their noise, is what B_S has moved since; the estimate moves by it and the interval is
         extended to contain both.
interval Fieller's, 90 %, over 16 blocks of equal weight (`interval.py`).

Where mu2 does not stand out of the noise, or the interval reaches over more than a factor of
WIDEST, the estimate is not `resolved`: it says "at least", with a one-sided 95 % bound.

The steps of an epoch draw without replacement, and no correction is made for it. At parameters that
do not depend on a fixed set of n samples, its own B_S would be n B_S / (n - 1 + B_S); those of a
training do depend on it, and the uncorrected number is the nearer one there (docs/batch.md).

Source: the moments, `noise.py`; the choice of the window, after Goldenshluger and Nemirovski 1997,
"On spatially adaptive estimation of nonparametric regression", Math. Methods Stat. 6, who intersect
intervals of growing windows. Difference: the point estimate of the longer window has to lie within
the intervals of the shorter ones, which notices a drift earlier than two intervals coming apart.
Windows, not exponential averages: at equal variance their mean age is equal, blocks of equal weight
are blocks of equal length, and what has left the window has left no trace.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from hpctrain.state import Placed, State
from hpctrain.stats.interval import Array, Places, Ratio, ratio_of
from hpctrain.stats.noise import GroupSums, NoiseEstimate

REMEMBERED = 4096
"""Steps; also the longest window."""
SHORTEST = 16
FEWEST = 8
"""Measured steps before the first estimate."""
NARROW = 3.0
WIDEST = 4.0

_MEAN_SQUARE_STEPS = 16


class NoiseAverage:
    """Averages of s2 and mu2 over as many of the latest steps as their noise asks for.

    Attributes:
        skipped: sums left out because they were not finite.
    """

    def __init__(self) -> None:
        """Local."""
        self._rows = np.zeros((2 * REMEMBERED, 3))
        """s2, mu2 and w of each step, oldest first."""
        self._end = 0
        self.skipped = 0

    def add(self, sums: GroupSums) -> None:
        """Note a measured step. Local. Sums that are not finite are skipped and counted.

        Raises:
            ValueError: fewer than two groups.
        """
        s2, mu2 = sums.moments()
        if not (math.isfinite(s2) and math.isfinite(mu2)):
            self.skipped += 1
            return
        if self._end == len(self._rows):
            self._rows[:REMEMBERED] = self._rows[REMEMBERED:]
            self._end = REMEMBERED
        weight = sums.samples * (1.0 - 1.0 / sums.groups)
        self._rows[self._end] = s2, mu2, weight
        self._end += 1

    def estimate(self) -> NoiseEstimate | None:
        """B_S of the present parameters. Local, and changes nothing.

        None before FEWEST measured steps, and while all gradients are zero.
        """
        s2_n, mu2_n, weight_n = self._recent().T
        n = len(s2_n)
        if n < FEWEST:
            return None
        square_n, latest = mean_squares(s2_n + mu2_n)
        known = square_n > 0.0
        if not known[-SHORTEST:].any():
            return None
        scale_n = np.divide(1.0, square_n, out=np.zeros(n), where=known)
        starts = windows(n)
        ratio = ratio_of(weight_n * known, s2_n * scale_n, mu2_n * scale_n, starts)
        return choose(ratio, n - starts, latest)

    def state(self) -> State:
        """(REMEMBERED or fewer, 3) steps, oldest first. Local."""
        rows = torch.from_numpy(self._recent().copy())
        return State({"steps": Placed(rows)}, {"skipped": self.skipped})

    def load_state(self, state: State) -> None:
        """Local."""
        rows = state.tensors["steps"].tensor.numpy()
        self._end = len(rows)
        self._rows[: self._end] = rows
        self.skipped = int(state.counters["skipped"] or 0)

    def _recent(self) -> Array:
        return self._rows[max(self._end - REMEMBERED, 0) : self._end]


def mean_squares(square_n: Array) -> tuple[Array, float]:
    """m_t of every step, and what it will be for the next one. Local, pure.

    Args:
        square_n: (n,) s2 + mu2 by step, n > 1.
    """
    n = len(square_n)
    first = min(_MEAN_SQUARE_STEPS, n)
    past = np.convolve(square_n, np.full(first, 1.0 / first), "valid")
    others = (first * past[0] - square_n[:first]) / (first - 1)
    return np.concatenate([others, past[:-1]]), float(past[-1])


def windows(n: int) -> Places:
    """First steps of the windows, shortest window first; the last is all n steps. Local, pure."""
    lengths = [SHORTEST << k for k in range(n.bit_length()) if SHORTEST << k < n]
    return n - np.array([*lengths, n])


def choose(ratio: Ratio, lengths: Places, unit: float) -> NoiseEstimate:
    """The shortest window that is narrow enough, or else the surest. Local, pure.

    Args:
        ratio: s2 over mu2 in each window, shortest first.
        lengths: (windows,) steps.
        unit: What 1 stands for in the averages of `ratio`.
    """
    moved = np.exp(ratio.shift)
    low = 1.0 + ratio.low * np.minimum(moved, 1.0)
    high = 1.0 + ratio.high * np.maximum(moved, 1.0)
    mu2 = ratio.bottom / moved
    with np.errstate(divide="ignore", invalid="ignore"):
        b_s = 1.0 + np.where(mu2 > 0.0, np.maximum(ratio.top, 0.0) / mu2, np.inf)
    at_least, at_most, taken = 0.0, np.inf, 0
    for window in range(len(lengths)):
        here = b_s[window] if ratio.resolved[window] else at_least
        if not at_least <= here <= at_most or low[window] > at_most:
            break
        narrow = high[window] <= NARROW * low[window]
        if narrow or ratio.error[window] < ratio.error[taken]:
            taken = window
        if narrow:
            break
        at_least, at_most = max(at_least, low[window]), min(at_most, high[window])
    resolved = bool(high[taken] <= WIDEST * low[taken])
    return NoiseEstimate(
        b_s=float(b_s[taken]),
        low=float(low[taken]),
        high=float(high[taken]) if resolved else math.inf,
        resolved=resolved,
        s2=unit * float(ratio.top[taken]),
        mu2=unit * float(mu2[taken]),
        steps=int(lengths[taken]),
    )
