"""Chooses per bucket between the sparse exchange and the dense sum, by what they take.

    measure: each form in turn, buckets one after another, `_PROBES` steps (one is enough where they
             differ by a factor of 2); the slowest rank counts
    choose:  the faster form; the one in use must be slower by `hysteresis` to be given up
    retry:   when the steps since have taken so long that one step of each form is at most
             `retry_share` of that time

Both forms keep the same residuals, so a switch loses nothing: a dense step sends what had waited.
Choices follow from seconds and are not repeatable; `density` in metrics.jsonl records them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hpctrain.state import Counter
from hpctrain.transport.communicator import Communicator

_SETTLING_STEPS = 2
_PROBES = 3
_CLEAR = 2.0
_SPARSE, _WHOLE = 0, 1


class Switch:
    """The choice per bucket. Local to make; equal on all ranks.

    Args:
        hysteresis: The form in use is given up only for one so many times faster.
        retry_share: Most of the steps' time that retries may take.
        n_buckets: Number of buckets.
        comm: All ranks.
    """

    def __init__(
        self, hysteresis: float, retry_share: float, n_buckets: int, comm: Communicator
    ) -> None:
        self._hysteresis, self._retry_share, self._comm = hysteresis, retry_share, comm
        self.whole = [False] * n_buckets
        """Which buckets are summed whole at the next step."""
        self.measures = False
        """Whether the next step's buckets go one after another, to be timed."""
        self.retry_s = 0.0
        """Time of the steps that tried a form not in use, after the first choice."""
        self.total_s = 0.0
        """Time of all steps so far."""
        self._kept = list(self.whole)
        self._chosen = False
        self._trial = _SPARSE
        self._found: list[list[np.ndarray]] = [[], []]
        self._wait = _SETTLING_STEPS

    def settle(self, step_s: float, exchange_s: Sequence[float], apply_s: Sequence[float]) -> None:
        """Collective on the steps that measure, else local. Learn from the step that ended.

        Args:
            step_s: Its duration.
            exchange_s: Seconds of each bucket, where it was measured.
            apply_s: Seconds of each bucket's application.
        """
        self.total_s += step_s
        if not self.measures:
            self._wait -= 1
            if self._wait <= 0:
                self._found = [[], []]
                self._try(_SPARSE)
            return
        seconds = np.array([*np.add(exchange_s, apply_s), step_s, self.total_s])
        self._comm.allreduce(seconds, "max")
        self._found[self._trial].append(seconds[:-2])
        self.total_s = float(seconds[-1])
        if self._chosen and self.whole != self._kept:
            self.retry_s += float(seconds[-2])
        if self._is_enough():
            if self._trial == _SPARSE:
                self._try(_WHOLE)
            else:
                self._choose()

    def counters(self) -> dict[str, Counter]:
        """What a checkpoint keeps: the choice. Local."""
        return {"whole": "".join("1" if whole else "0" for whole in self._kept)}

    def load_counters(self, counters: Mapping[str, Counter]) -> None:
        """Take a stored choice, if it is of as many buckets. Local."""
        stored = str(counters.get("whole", ""))
        if len(stored) == len(self._kept):
            self._kept = [mark == "1" for mark in stored]
            self.whole = list(self._kept)

    def _is_enough(self) -> bool:
        if self._chosen or len(self._found[self._trial]) == _PROBES:
            return True
        if self._trial == _SPARSE:
            return False
        sparse_s, whole_s = (np.median(found, axis=0).sum() for found in self._found)
        return bool(max(sparse_s, whole_s) > _CLEAR * min(sparse_s, whole_s))

    def _try(self, form: int) -> None:
        self._trial, self.measures = form, True
        self.whole = [form == _WHOLE] * len(self.whole)

    def _choose(self) -> None:
        sparse, whole = (np.median(found, axis=0) for found in self._found)
        for bucket, kept in enumerate(self._kept):
            favour = (self._hysteresis if kept else 1 / self._hysteresis) if self._chosen else 1.0
            self._kept[bucket] = bool(whole[bucket] < favour * sparse[bucket])
        self.whole = list(self._kept)
        self._chosen, self.measures = True, False
        # A trial costs at most a step of either form; compute time makes its share smaller.
        trial_s = float(sparse.sum() + whole.sum())
        self._wait = math.ceil(trial_s / float(np.minimum(sparse, whole).sum()) / self._retry_share)
