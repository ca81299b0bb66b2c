"""The gradient noise of a run, from the gradients of groups of samples in the same step.

g_j        mean gradient of the b_j samples of group j, j = 1..K (a rank's share, a micro-batch)
gbar       sum_j b_j g_j / B,  B = sum_j b_j: the gradient that the step uses
s2         trace of the covariance of one sample's gradient
mu2        |E g|², the squared length of the gradient without noise
B_S        1 + s2 / mu2 = E|g_i|² / |E g|²: Yin's bound on the batch size

s2_hat  = (sum_j b_j |g_j|² - B |gbar|²) / (K - 1)        unbiased
mu2_hat = |gbar|² - s2_hat / B                            unbiased, may be negative
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupSums:
    """What one step's groups add up to; equal on all ranks once reduced."""

    groups: float
    """K, groups with at least one sample."""
    samples: float
    """B, samples in all of them."""
    weighted_sq: float
    """sum_j b_j |g_j|²."""
    mean_sq: float
    """|gbar|²."""

    def moments(self) -> tuple[float, float]:
        """(s2_hat, mu2_hat). Local, pure.

        Raises:
            ValueError: fewer than two groups, which say nothing about noise.
        """
        if self.groups < 2:
            raise ValueError(f"noise needs two groups of samples; got {self.groups:g}")
        s2 = (self.weighted_sq - self.samples * self.mean_sq) / (self.groups - 1.0)
        return s2, self.mean_sq - s2 / self.samples


@dataclass(frozen=True)
class NoiseEstimate:
    """B_S as measured so far, with a 90 % interval."""

    b_s: float
    """Of the ratio of averages; not to be used where it is not `resolved`."""
    low: float
    """Lower end of the interval; where not resolved, a one-sided 95 % lower bound. At least 1."""
    high: float
    """Upper end; inf where not resolved."""
    resolved: bool
    """Whether the mean gradient stands out of the noise, and clearly enough for a number."""
    s2: float
    """Averages, in the units of the latest step; mu2 may be negative where not resolved."""
    mu2: float
    steps: int
    """Measured steps that the averages rest on."""
