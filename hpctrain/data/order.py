"""Which samples the next step takes: a pure function of (seed, epoch) and a cursor.

    iid:     permutation_e = shuffle of 0..n-1 by PCG64(seed, epoch e)
             step: the next batch_global entries; rank r takes [B·r//P, B·(r+1)//P) of them
    shards:  rank r owns a fixed part of the samples and shuffles it afresh each epoch;
             of positions c = 0, 1, 2, ... of an epoch, rank c mod P takes its next sample

The last batch of an epoch is short, never padded, and no batch spans two epochs. Under iid the
sequence does not depend on the number of ranks. Under shards a rank that has used up its own part
waits for the others: the true size of such a batch is smaller, and every rank can compute it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch

from hpctrain.data.seeding import Purpose, generator
from hpctrain.errors import ConfigError
from hpctrain.state import Counter, Placed, State


@dataclass(frozen=True)
class Position:
    """A place in the order; equal on all ranks."""

    epoch: int = 0
    cursor: int = 0
    """Positions passed in this epoch; under iid, samples taken."""


@dataclass(frozen=True)
class Step:
    """One step's piece of the order; equal on all ranks."""

    start: Position
    stop: int
    batch_global: int
    """True number of samples over all ranks."""
    after: Position
    starts_epoch: bool


@dataclass(frozen=True)
class Slice:
    """One rank's share of a step."""

    epoch: int
    indices: np.ndarray
    """Sample numbers of this rank; may be empty."""
    batch_global: int
    """True number of samples over all ranks."""
    batch_replica: int
    """The same over the ranks of this rank's replica."""
    starts_epoch: bool


class SampleOrder:
    """The global order and where it stands. Every method is local; all ranks must ask alike.

    Args:
        n_samples: of the training set.
        seed: of the run.
        rank, size: this rank and the number of ranks.
        shards: each rank's own sample numbers (see `partition`), every sample in exactly one;
            None = iid.
        replica: the ranks whose gradients are summed with this rank's; None = all.

    Raises:
        ConfigError: there are no samples, or not one shard per rank.
    """

    def __init__(
        self,
        n_samples: int,
        seed: int,
        rank: int,
        size: int,
        shards: Sequence[np.ndarray] | None = None,
        replica: Sequence[int] | None = None,
    ) -> None:
        if n_samples < 1:
            raise ConfigError("the training set has no samples; raise data.limit_train or add data")
        if shards is not None and len(shards) != size:
            raise ConfigError(f"{len(shards)} shards for {size} ranks; make one shard per rank")
        self.n_samples = n_samples
        self.position = Position()
        self.own_pace = False
        """Whether ranks stand at different places; a checkpoint then holds each rank's. Others in
        number all go on where rank 0 stood."""
        self._seed, self._rank, self._size = seed, rank, size
        self._replica = range(size) if replica is None else replica
        self._counts_P: np.ndarray | None = None
        self._end = n_samples
        self._own = np.empty(0, np.uint32)
        self._shards_crc32 = 0
        if shards is not None:
            self._counts_P = np.array([len(shard) for shard in shards], np.int64)
            lasts_P = (self._counts_P - 1) * size + np.arange(size) + 1
            self._end = int(lasts_P[self._counts_P > 0].max())
            self._own = shards[rank]
            for shard in shards:
                self._shards_crc32 = crc32(shard.tobytes(), self._shards_crc32)
        self._shuffled: tuple[int, np.ndarray] | None = None

    @property
    def samples_seen(self) -> int:
        """Samples taken since the start, over all ranks and epochs."""
        return self.position.epoch * self.n_samples + self._taken(self.position.cursor)

    def next(self, batch_global: int, samples_left: int | None = None) -> Slice:
        """This rank's share of the next step; moves on.

        Args:
            batch_global: Samples to take over all ranks; fewer come at the end of an epoch.
            samples_left: Take no more than these, over all ranks.

        Raises:
            ConfigError: batch_global or samples_left is below 1.
        """
        step = self.plan(self.position, batch_global, samples_left)
        mine = self.slice(step)
        self.position = step.after
        return mine

    def plan(self, at: Position, batch_global: int, samples_left: int | None = None) -> Step:
        """The step that starts at `at`: arithmetic only, does not move on.

        Raises:
            ConfigError: as `next`.
        """
        if batch_global < 1 or (samples_left is not None and samples_left < 1):
            raise ConfigError(
                f"a step takes at least one sample; got batch_global = {batch_global}, "
                f"samples left = {samples_left}"
            )
        start, stop = at.cursor, min(at.cursor + batch_global, self._end)
        while self._taken(stop) == self._taken(start):  # only ranks that have used up their shards
            start, stop = stop, min(stop + batch_global, self._end)
        before = self._taken(start)
        if samples_left is not None and self._taken(stop) - before > samples_left:
            places = range(start, stop + 1)
            stop = places[bisect_right(places, before + samples_left, key=self._taken) - 1]
        ends = self._taken(stop) == self.n_samples
        return Step(
            start=Position(at.epoch, start),
            stop=stop,
            batch_global=self._taken(stop) - before,
            after=Position(at.epoch + 1, 0) if ends else Position(at.epoch, stop),
            starts_epoch=before == 0,
        )

    def slice(self, step: Step) -> Slice:
        """This rank's share of `step`. May be called by one background thread."""
        epoch, start, stop = step.start.epoch, step.start.cursor, step.stop
        shuffled = self._shuffle(epoch)
        if self._counts_P is None:
            cuts_P = start + (stop - start) * np.arange(self._size + 1) // self._size
            firsts_P, lasts_P = cuts_P[:-1], cuts_P[1:]
        else:
            firsts_P, lasts_P = self._passed_P(start), self._passed_P(stop)
        return Slice(
            epoch,
            shuffled[firsts_P[self._rank] : lasts_P[self._rank]],
            step.batch_global,
            int(sum(lasts_P[rank] - firsts_P[rank] for rank in self._replica)),
            step.starts_epoch,
        )

    def state(self) -> State:
        """Where the order stands. Local."""
        epoch, cursor = self.position.epoch, self.position.cursor
        counters = {"epoch": epoch, "cursor": cursor, **self._identity()}
        if not self.own_pace:
            return State(counters=counters)
        return State({"own": Placed(torch.tensor([epoch, cursor]), "per_rank", "reset")}, counters)

    def load_state(self, state: State) -> None:
        """Go to where another run's order stood. Local. iid orders fit any number of ranks.

        Raises:
            ConfigError: it was an order of other samples, of another seed or of other shards.
        """
        given = state.counters
        for name, mine in self._identity().items():
            if given[name] != mine:
                raise ConfigError(_mismatch(name, given[name], mine))
        self.position = Position(int(given["epoch"] or 0), int(given["cursor"] or 0))
        if "own" in state.tensors:
            self.position = Position(*state.tensors["own"].tensor.tolist())

    def _identity(self) -> dict[str, Counter]:
        sharded = self._counts_P is not None
        return {
            "n_samples": self.n_samples,
            "seed": self._seed,
            "shards": self._size if sharded else 0,
            "shards_crc32": self._shards_crc32,
        }

    def _taken(self, cursor: int) -> int:
        """Samples taken over all ranks when `cursor` positions of an epoch have passed."""
        return cursor if self._counts_P is None else int(self._passed_P(cursor).sum())

    def _passed_P(self, cursor: int) -> np.ndarray:
        """How many samples of its shard each rank has taken by then."""
        turns_P = (cursor + self._size - 1 - np.arange(self._size)) // self._size
        assert self._counts_P is not None
        passed_P: np.ndarray = np.minimum(turns_P, self._counts_P)
        return passed_P

    def _shuffle(self, epoch: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = None  # never two of them: an epoch's order can be large
            if self._counts_P is None:
                narrow = self.n_samples <= 2**32
                entries = np.arange(self.n_samples, dtype=np.uint32 if narrow else np.int64)
                generator(Purpose.ORDER, self._seed, epoch).shuffle(entries)
            else:
                entries = self._own.copy()
                generator(Purpose.SHARD_ORDER, self._seed, epoch, self._rank).shuffle(entries)
            self._shuffled = (epoch, entries)
        return self._shuffled[1]


def _mismatch(name: str, given: Counter, mine: Counter) -> str:
    if name == "n_samples":
        return (
            f"the checkpoint was made with a training set of {given} samples and this one has "
            f"{mine}; continue with the same data, data.limit_train and data.test_fraction, or "
            "start a new run"
        )
    if name == "seed":
        return (
            f"the checkpoint's sample order has seed {given}, this run has seed = {mine}; continue "
            "with the same seed, or start a new run"
        )
    if name == "shards" and given and mine:
        return (
            f"the checkpoint has {given} fixed shards, one per rank, and this run {mine} ranks; "
            f'continue with {given} ranks, or start a new run (data.partition = "iid" fits any '
            "number of ranks)"
        )
    return (
        "the checkpoint's data.partition or data.alpha differs from this run's; continue with the "
        "same values, or start a new run"
    )
