"""Whether ranks see different data: the noise between them against the noise inside them.

    between = (sum_r b_r |g_r|² - B |gbar|²) / (W - 1)              ranks as groups
    inside  = (sum_ra b_ra |g_ra|² - sum_r b_r |g_r|²) / (A - W)    micro-batches inside ranks

W ranks with A micro-batches in all. Both estimate the covariance of one sample's gradient where
every rank draws from the same data, so their ratio is near 1. Sorted or partitioned shards raise
it, and with it every estimate that takes ranks for groups.
"""

from __future__ import annotations

from collections import deque

import torch

from hpctrain.state import Placed, State
from hpctrain.stats.noise import GroupSums

LIMIT = 1.5
"""A ratio above which ranks do not see the same data."""
LOOKS = 32
"""How many looks are remembered."""
LEAST = 8
"""How many it takes to say anything."""


class DataSkew:
    """Compares the two over the last looks. Every method is local, every input reduced."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[float, float]] = deque(maxlen=LOOKS)

    def add(self, ranks: GroupSums, pieces: float, piece_weighted_sq: float) -> None:
        """Take one look in.

        Args:
            ranks: The step's sums with ranks as groups.
            pieces: A, more than there are ranks.
            piece_weighted_sq: sum_ra b_ra |g_ra|².
        """
        between, _ = ranks.moments()
        inside = (piece_weighted_sq - ranks.weighted_sq) / (pieces - ranks.groups)
        self._pairs.append((between, inside))

    def ratio(self) -> float | None:
        """Between over inside, a ratio of sums; None before there are `LEAST` looks."""
        if len(self._pairs) < LEAST:
            return None
        return sum(b for b, _ in self._pairs) / sum(i for _, i in self._pairs)

    def remark(self) -> str:
        """A warning where the ratio is above `LIMIT` by more than two standard errors, else ""."""
        ratio = self.ratio()
        if ratio is None:
            return ""
        inside = sum(i for _, i in self._pairs) / len(self._pairs)
        misses = torch.tensor([b - ratio * i for b, i in self._pairs], dtype=torch.float64)
        error = float(misses.std()) / len(self._pairs) ** 0.5 / inside
        if ratio - 2.0 * error <= LIMIT:
            return ""
        return (
            f"gradients differ {ratio:.1f} times as much between ranks as inside them: ranks do "
            "not see the same data (sorted or partitioned?), and the measured B_S is too large"
        )

    def state(self) -> State:
        """The last looks. Local."""
        return State({"pairs": Placed(torch.tensor(list(self._pairs), dtype=torch.float64))})

    def load_state(self, state: State) -> None:
        """Take them back. Local."""
        self._pairs.clear()
        self._pairs.extend((b, i) for b, i in state.tensors["pairs"].tensor.tolist())
