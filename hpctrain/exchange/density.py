"""How many entries to keep: the count with the most descent per unit of cost.

    T* = argmax over T of descent(T) / cost(P(T))

descent(T) is the guaranteed decrease of an L-smooth function by a step along the compressed
gradient, in units of ||g||^2 / (2L); I_T are the T largest |g_j|; P(T) is the payload in bits:

    top         g_j for j in I_T              ||g_I||^2 / ||g||^2              T (index + value)
    sign        mean|g_I| sign(g_j), I_T      ||g_I||_1^2 / (T ||g||^2)        value + T (index + 1)
    stochastic  g_j / p_j with chance p_j     ||g||^2 / sum_j (g_j^2 / p_j)    T (index + value)

with p_j = min(1, lambda |g_j|), sum of p_j = T ("water filling", the best chances of that sum).
All three depend on the magnitudes alone and keep their value when every entry is repeated, so a
strided sample of m of the n magnitudes serves in place of all: T of n is T m / n of the sample.

Source: Khirirat, Magnusson, Aytekin, Johansson 2021, "A Flexible Framework for
Communication-Efficient Machine Learning" (arXiv 2003.06377): the three compressors, bit and packet
costs. Differences: magnitudes may be a sample; index and value widths are settings; the cost may
be seconds. Nothing here communicates. Work: one sort of at most 65,536 magnitudes.

The rule is greedy: it values what is sent now, as if what is kept back were lost. With error
feedback it is not lost: on w8a one entry per step did as well per step as any other count
(docs/figures/density.svg).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Compressor = Literal["top", "sign", "stochastic"]
FloatArray = NDArray[np.float64]

LARGEST_SAMPLE = 1 << 16
"""Magnitudes looked at; of more, every so-manieth."""


class Cost(Protocol):
    """What a message costs, in any unit."""

    def cost(self, payload_bits: FloatArray) -> FloatArray:
        """The cost of each payload; positive for a payload of at least one bit."""


@dataclass(frozen=True)
class BitCost:
    """c1 * P + c0: bits on the wire, c0 of them in every message."""

    c1: float = 1.0
    c0: float = 0.0

    def cost(self, payload_bits: FloatArray) -> FloatArray:
        return self.c1 * payload_bits + self.c0


@dataclass(frozen=True)
class PacketCost:
    """c1 * ceil(P / packet_bits) + c0: a packet costs the same whether full or not."""

    c1: float
    c0: float
    packet_bits: int

    def cost(self, payload_bits: FloatArray) -> FloatArray:
        return self.c1 * np.ceil(payload_bits / self.packet_bits) + self.c0


@dataclass(frozen=True)
class SecondCost:
    """Seconds of a step: compute_s + rounds * latency_s + P * seconds_per_bit.

    Args:
        latency_s: Time of an empty message.
        seconds_per_bit: Time for a bit of this rank's payload, as often as the exchange sends it.
        compute_s: Time of the step that communication does not hide.
        rounds: Messages that wait for each other.
    """

    latency_s: float
    seconds_per_bit: float
    compute_s: float = 0.0
    rounds: int = 1

    def cost(self, payload_bits: FloatArray) -> FloatArray:
        return self.compute_s + self.rounds * self.latency_s + payload_bits * self.seconds_per_bit


def descent(compressor: Compressor, magnitudes: NDArray[Any], counts: FloatArray) -> FloatArray:
    """Descent of one step in units of ||g||^2 / (2L), from 0 to 1. Local.

    Args:
        compressor: Which compressor.
        magnitudes: (m,) |g_j| in decreasing order, not all zero.
        counts: (c,) counts T in (0, m]; of a T between whole numbers, the last entry is a part.
    """
    g = np.asarray(magnitudes, np.float64) / float(magnitudes[0])
    whole = np.arange(len(g) + 1.0)
    squares = np.concatenate(([0.0], np.cumsum(g * g)))
    total = float(squares[-1])
    if compressor == "top":
        kept: FloatArray = np.interp(counts, whole, squares)
        return kept / total
    sums = np.concatenate(([0.0], np.cumsum(g)))
    if compressor == "sign":
        kept = np.interp(counts, whole, sums) ** 2
        return kept / (counts * total)
    # The first s chances are 1 as soon as (T - s) g_{s+1} > R_s, the sum of all after the first s.
    g = g[: np.count_nonzero(g)]
    rest = np.cumsum(g[::-1])[::-1]
    turns = np.maximum.accumulate(np.arange(len(g)) + rest / g)
    certain = np.searchsorted(turns, counts, side="left")
    in_part = certain < len(g)
    s = certain[in_part]
    noise: FloatArray = squares[certain]
    noise[in_part] += rest[s] ** 2 / (counts[in_part] - s)
    return total / noise


def payload_bits(
    compressor: Compressor,
    counts: FloatArray,
    n: int,
    *,
    index_bits: int | None = None,
    value_bits: int = 32,
) -> FloatArray:
    """Bits of a message with `counts` of n entries (on average, if stochastic). Local.

    Args:
        compressor: Which compressor.
        counts: (c,) numbers of kept entries.
        n: Length of the vector, which sets index_bits to ceil(log2 n) where none is given.
        index_bits: Bits of an index.
        value_bits: Bits of a value.
    """
    index = max(n - 1, 0).bit_length() if index_bits is None else index_bits
    if compressor == "sign":
        return value_bits + counts * (index + 1.0)
    return counts * float(index + value_bits)


def best_count(
    magnitudes: NDArray[Any],
    n: int,
    compressor: Compressor,
    cost: Cost,
    lowest: int = 1,
    highest: int | None = None,
    *,
    index_bits: int | None = None,
    value_bits: int = 32,
) -> int:
    """The number of entries with the most descent per cost; of equally good ones the least. Local.

    Args:
        magnitudes: |g_j| in any order: all n of them, or a sample spread evenly over them. Exact
            for all of up to 65,536; otherwise an estimate, poor below some ten times n / m.
        n: Length of the vector.
        compressor: Which compressor.
        cost: What a message costs.
        lowest: Least answer (n, where n is smaller).
        highest: Largest answer; n by default.
        index_bits: As in `payload_bits`.
        value_bits: As in `payload_bits`.

    Returns:
        The count; `lowest` if all magnitudes are zero, or one is not finite (a refused step).
    """
    highest = n if highest is None else min(highest, n)
    lowest = min(lowest, highest)
    sample = magnitudes[:: max(1, -(-len(magnitudes) // LARGEST_SAMPLE))]
    ordered = np.sort(sample)[::-1]
    if lowest == highest or not len(ordered) or not 0.0 < ordered[0] < np.inf:
        return lowest

    def best_of(counts: FloatArray) -> int:
        gain = descent(compressor, ordered, counts * (len(ordered) / n))
        bits = payload_bits(compressor, counts, n, index_bits=index_bits, value_bits=value_bits)
        return int(np.argmax(gain / cost.cost(bits)))

    counts = _candidates(lowest, highest)
    best = best_of(counts)
    if highest - lowest < LARGEST_SAMPLE:
        return int(counts[best])
    first, last = counts[max(best - 1, 0)], counts[min(best + 1, len(counts) - 1)]
    step = max(1.0, (last - first) // LARGEST_SAMPLE)
    counts = np.arange(first, last + 1.0, step)
    return int(counts[best_of(counts)])


def _candidates(lowest: int, highest: int) -> FloatArray:
    """All counts if few; otherwise the first 1,024, then steps of 0.5 %."""
    if highest - lowest < LARGEST_SAMPLE:
        return np.arange(lowest, highest + 1.0)
    first = np.arange(lowest, lowest + 1024.0)
    later = np.geomspace(first[-1], highest, int(200 * np.log(highest / first[-1])) + 2)
    return np.unique(np.concatenate((first, np.round(later))))
