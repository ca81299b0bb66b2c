"""Picks entries on a GPU without waiting for it: every size is known before the data are.

    t <- the (k (1 + margin) m / n)-th largest of m sampled magnitudes, a tensor on the device
    candidates <- the first `capacity` positions whose magnitude is not <= t
    picked <- the k candidates of largest magnitude, in ascending order of position

The host never reads a number back, so the picked entries follow the gradient on the stream and only
they cross to the host, in one copy of 8 k bytes. Where the sampled threshold misses (fewer than k
candidates, or more than `capacity`), fewer or other entries are picked than the exact top k; a pick
that is short is filled up with entries of value 0, which change nothing. `select` is exact; this is
not, and k is an upper bound of what is sent.

Works on any torch device; on the host `select` is several times faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HITS = 256
_SAMPLES = 1 << 16


@dataclass(frozen=True)
class DevicePicked:
    """Entries of a vector, on its device."""

    indices_K: Tensor
    """int64, ascending."""
    values_K: Tensor
    """Of the vector's dtype."""
    finite: Tensor
    """(), bool: whether the vector holds neither inf nor NaN."""


def pick_on_device(x_N: Tensor, k: int, call: int = 0) -> DevicePicked:
    """About the k entries of `x_N` (N,) of largest magnitude. Local, without synchronisation.

    Args:
        x_N: The vector.
        k: Entries to pick, at most N.
        call: Number of this call; the sample starts elsewhere each time.
    """
    n = len(x_N)
    if k == 0 or n == 0:
        nowhere = torch.empty(0, dtype=torch.int64, device=x_N.device)
        return DevicePicked(nowhere, x_N[:0], torch.isfinite(x_N).all())
    magnitudes = x_N.abs()
    capacity = min(n, 2 * k + 64)
    if capacity == n:
        candidates = torch.arange(n, device=x_N.device)
        sizes = magnitudes
    else:
        stride = max(1, k // _HITS, n // _SAMPLES) | 1
        sample = magnitudes[call * 7919 % stride :: stride]
        wanted = k / stride
        wanted = min(len(sample), int(wanted + 3.0 * wanted**0.5 + 1.0))
        threshold = torch.topk(sample, wanted, sorted=True).values[-1]
        # Not "greater": an inf or NaN is a candidate, and is seen.
        found = torch.nonzero_static(
            ~(magnitudes <= threshold), size=capacity, fill_value=n
        ).squeeze(1)
        filled = found < n
        candidates = torch.where(filled, found, 0)
        sizes = torch.where(filled, magnitudes[candidates], -1.0)
    order = torch.topk(sizes, k, sorted=False).indices
    real = sizes[order] >= 0
    # Entries that only fill up stand at distinct positions too, with value 0.
    indices = torch.where(real, candidates[order], torch.arange(k, device=x_N.device))
    values = torch.where(real, x_N[indices], 0.0)
    indices, turn = torch.sort(indices)
    return DevicePicked(indices, values[turn], torch.isfinite(magnitudes.sum()))
