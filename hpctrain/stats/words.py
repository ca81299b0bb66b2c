"""The gradient noise in words, for people."""

from __future__ import annotations

from hpctrain.stats.noise import NoiseEstimate


def short(number: float) -> str:
    """A positive number with two or three digits: 9.3, 870, 3.1k, 33k, 1.2M. Local, pure."""
    for unit in ("", "k", "M", "G"):
        if number < 9.95:
            return f"{number:.1f}{unit}"
        if number < 999.5:
            return f"{number:.0f}{unit}"
        number /= 1000.0
    return f"{number:.3g}T"


def noise_in_words(estimate: NoiseEstimate) -> str:
    """`B_S 3.1k [2.2k-4.6k]`, or `B_S at least 4.2k` where it is not resolved. Local, pure."""
    if not estimate.resolved:
        return f"B_S at least {short(estimate.low)}"
    return f"B_S {short(estimate.b_s)} [{short(estimate.low)}-{short(estimate.high)}]"


def sample_efficiency(b_s: float, batch_global: float) -> float:
    """What a sample of such a batch is worth, next to a sample of a batch of one. Local, pure.

        1 / (1 + (B - 1) / B_S)

    Source: Yin et al. 2018, arXiv 1706.05699: a step of B samples gains as much as B steps of one
    divided by 1 + (B - 1) / B_S; AdaScale's gain over its scale, arXiv 2007.05105, is the same.
    """
    return 1.0 / (1.0 + (batch_global - 1.0) / b_s)


def efficiency_in_words(estimate: NoiseEstimate, batch_global: float) -> str:
    """`sample efficiency 86 %`, or `sample efficiency at least 86 %`. Local, pure."""
    bound, b_s = ("", estimate.b_s) if estimate.resolved else ("at least ", estimate.low)
    return f"sample efficiency {bound}{100.0 * sample_efficiency(b_s, batch_global):.0f} %"
