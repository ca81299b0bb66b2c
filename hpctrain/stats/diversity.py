"""Gradient diversity, exactly: from the gradients of all samples at one set of parameters.

g_i        gradient of sample i's loss, i = 1..n
Delta_S    sum_i |g_i|² / |sum_i g_i|²                      gradient diversity
B_S        n Delta_S = 1 + s2 / mu2                         bound on the batch size
mu2, s2    |mean of g_i|², and the trace of the covariance of the g_i (divided by n)

1 <= B_S <= inf: 1 where all gradients are equal, n where they are orthogonal to each other, more
where they cancel, as they do near a minimum. Mini-batch SGD that sums gradients (in other words:
scales the step size in proportion to the batch) keeps pace with serial SGD per sample up to a
batch of delta B_S + 1, at (1 + delta / 2) times its error.

Of m samples drawn without replacement the same sums are biased: m Delta never exceeds about m. So

    S2  = (sum |g_i|² - m |gbar|²) / (m - 1)                unbiased
    mu2 = |gbar|² - S2 (1/m - 1/n)                          unbiased, may be negative
    s2  = S2 (n - 1) / n

which are the exact values where m = n.

Source: D. Yin, A. Pananjady, M. Lam, D. Papailiopoulos, K. Ramchandran, P. Bartlett, "Gradient
diversity: a key ingredient for scalable distributed learning", AISTATS 2018, arXiv 1706.05699,
definitions 1 and 2 and theorem 1. The correction for m < n is not theirs: it is the usual one for a
finite population.

`effective_rank` is another quantity that is called gradient diversity elsewhere: see there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Two sums over the gradients of m samples out of n, of a layer or of all parameters."""

    samples: int
    """m, measured."""
    population: int
    """n, in the whole set."""
    sum_sq: float
    """sum_i |g_i|² over the m."""
    sum_norm_sq: float
    """|sum_i g_i|² over the m."""

    def __post_init__(self) -> None:
        if not 2 <= self.samples <= self.population:
            raise ValueError(
                f"diversity needs 2 samples or more out of {self.population}; got {self.samples}"
            )

    @property
    def s2(self) -> float:
        """Trace of the covariance of one sample's gradient, over the whole set."""
        m, n = self.samples, self.population
        scattered = (self.sum_sq - self.sum_norm_sq / m) / (m - 1)
        return max(scattered, 0.0) * (n - 1) / n

    @property
    def noise(self) -> float:
        """What the noise of m samples adds to |gbar|² on average; 0 where all were measured."""
        m, n = self.samples, self.population
        return 0.0 if m == n else self.s2 * n / (n - 1) * (1.0 / m - 1.0 / n)

    @property
    def mu2(self) -> float:
        """Squared length of the mean gradient of the whole set; an estimate may be negative."""
        return self.sum_norm_sq / self.samples**2 - self.noise

    @property
    def resolved(self) -> bool:
        """Whether at least half of |gbar|² is signal; true where all samples were measured."""
        return self.samples == self.population or self.mu2 >= self.noise

    @property
    def b_s(self) -> float:
        """The bound n Delta_S. Where not `resolved` a lower estimate: |gbar|² taken as it is.

        inf where the gradients cancel, NaN where all of them are zero.
        """
        return _over(self.s2, self.mu2 if self.resolved else self.mu2 + self.noise) + 1.0

    @property
    def delta_s(self) -> float:
        """Gradient diversity of the whole set, B_S / n."""
        return self.b_s / self.population


@dataclass(frozen=True)
class Diversity(Moments):
    """Gradient diversity of a model on a set of samples."""

    layers: tuple[tuple[str, Moments], ...] = ()
    """The same of each parameter alone, by name; their sums add up to the whole."""


def from_sums(
    samples: int,
    population: int,
    names: Sequence[str],
    sizes: Sequence[int],
    sq_L: Tensor,
    sum_P: Tensor,
) -> Diversity:
    """Diversity from what was added up over samples. Local, pure.

    Args:
        samples: m, samples in the sums.
        population: n, samples in the set they were drawn from without replacement.
        names: The L parameters.
        sizes: Their numbers of entries, P together.
        sq_L: sum_i |g_i|² of each parameter, (L,) float64.
        sum_P: sum_i g_i, parameter after parameter, (P,) float64.

    Raises:
        ValueError: fewer than two samples, or sums of other lengths.
    """
    if len(names) != len(sizes) or sq_L.shape != (len(names),) or sum_P.shape != (sum(sizes),):
        raise ValueError(
            f"{len(names)} names, {len(sizes)} sizes and {sum(sizes)} entries; got sums of "
            f"{tuple(sq_L.shape)} and {tuple(sum_P.shape)}"
        )
    norm_sq = [float(part @ part) for part in sum_P.split(list(sizes))]
    layers = [
        (name, Moments(samples, population, square, length))
        for name, square, length in zip(names, sq_L.tolist(), norm_sq, strict=True)
    ]
    return Diversity(samples, population, float(sq_L.sum()), sum(norm_sq), tuple(layers))


def of_matrix(g_ND: Tensor) -> Diversity:
    """Diversity of gradients that stand in the rows of a matrix, (n, d). Local, pure."""
    g = g_ND.double()
    sizes = [g.shape[1]]
    return from_sums(len(g), len(g), ["all"], sizes, g.square().sum()[None], g.sum(0))


def effective_rank(gram_MM: Tensor) -> float:
    """grad_erank: the effective rank of M gradients, from their products. Local, pure.

    exp(-sum_k p_k log p_k), p_k = sigma_k / sum sigma, over the singular values sigma_k of the
    matrix with one gradient in each row; between 1 (all parallel) and min(M, P) (orthogonal and
    equally long). It says how many directions the gradients use, Delta_S how much they cancel:
    equal gradients and gradients along one line with either sign both have rank 1, and a B_S of 1
    and of inf. Continual learning calls it gradient diversity (A. Lewandowski et al., ICLR 2025,
    arXiv 2406.06811); the definition is O. Roy and M. Vetterli's, EUSIPCO 2007.

    Args:
        gram_MM: g_i . g_j, (M, M) float64, symmetric.

    Returns:
        NaN where all gradients are zero, or some are not finite.
    """
    if not gram_MM.isfinite().all():
        return math.nan
    eigenvalues = torch.linalg.eigvalsh(gram_MM.double()).clamp_min(0.0)
    # What rounding leaves of a zero eigenvalue would count with its square root.
    floor = float(eigenvalues.max()) * len(gram_MM) * torch.finfo(torch.float64).eps
    sigma = eigenvalues[eigenvalues > floor].sqrt()
    if not len(sigma):
        return math.nan
    p = sigma / sigma.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def replicated_b_s(noise_to_signal: float, samples: int, copies: int) -> float:
    """B_S expected of a set with n / r distinct samples in r copies each. Local, pure.

        B_S = 1 + s2 / (mu2 + s2 r / n)

    at parameters that do not depend on the sample. Copies leave s2 as it is and make the mean
    gradient of the set noisier, so it gets longer: B_S falls, to at most n / r + 1.

    Args:
        noise_to_signal: s2 / mu2 of the distribution the samples come from; inf is legal.
        samples: n, copies included.
        copies: r.
    """
    return 1.0 + 1.0 / (1.0 / noise_to_signal + copies / samples)


def _over(a: float, b: float) -> float:
    if b == 0.0:
        return math.nan if a == 0.0 else math.inf
    return a / b
