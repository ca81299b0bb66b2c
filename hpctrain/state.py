"""What a checkpoint holds of one component: named tensors with a placement, and counters.

Every component with memory (parameters, optimiser, exchange, sync rule, batch policy, sample
order, random generators) offers a `State` and takes one back. Each tensor declares where it lives
and what a change of the number of ranks does to it, so that checkpoint code needs no special cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

Placement = Literal["replicated", "replica", "per_rank", "shard", "pieces"]
"""replicated: equal on all ranks; replica: equal on the ranks of one replica, written by the first
of them; per_rank: each rank its own; shard: contiguous pieces, in rank order, of one flat vector;
pieces: see `Pieces`."""

Resize = Literal["keep", "sum", "mean", "reset"]
"""What another number of ranks does.

keep: `replicated` and `shard` only; the value is the same whole vector (a shard is re-cut).
sum: new rank r takes the sum of the old ranks congruent to r modulo the new number of ranks
     (zeros when there are none), so that the sum over ranks is conserved. Of `pieces`, the same
     with parties in place of ranks.
mean: every new rank takes the mean over the old ranks, or of `replica` over the old replicas.
reset: the tensor is left out of the loaded state; the component starts it afresh.
"""

Counter = int | float | str | bool | None


def shard_bounds(n: int, rank: int, size: int) -> tuple[int, int]:
    """Start and end of `rank`'s piece of a flat vector of n elements. Local.

    The one rule by which shards are cut (and re-cut for another number of ranks): the first
    n mod size ranks hold one element more than the others.
    """
    base, longer = divmod(n, size)
    start = rank * base + min(rank, longer)
    return start, start + base + (1 if rank < longer else 0)


@dataclass(frozen=True)
class Span:
    """Entries of a flat vector: `block` of every `stride`, from `start` on, below `stop`."""

    start: int
    stop: int
    block: int
    stride: int

    @staticmethod
    def whole(start: int, stop: int) -> Span:
        """All entries of [start, stop)."""
        return Span(start, stop, max(stop - start, 1), max(stop - start, 1))

    def indices(self) -> torch.Tensor:
        """(N,) int64, ascending. Local."""
        import torch

        starts = torch.arange(self.start, self.stop, self.stride)
        found = (starts[:, None] + torch.arange(self.block)).flatten()
        return found[found < self.stop]


@dataclass(frozen=True)
class Pieces:
    """A party (some ranks) has one flat vector, and this rank's tensor holds these pieces of it.

    Pieces may overlap: the vector is the sum of all of them, over the party's ranks.
    """

    party: int
    parties: int
    spans: tuple[Span, ...]
    """The tensor's entries, one span after another."""
    spare: int = 0
    """So many of the last spans are zero after a change of parties or spans."""


@dataclass(frozen=True)
class Placed:
    """A tensor with its placement and resize rule."""

    tensor: torch.Tensor
    placement: Placement = "replicated"
    resize: Resize = "keep"
    pieces: Pieces | None = None
    """With placement "pieces"."""
    owner: int | None = None
    """With placement "replica": the rank that writes it."""

    def __post_init__(self) -> None:
        if (self.placement == "pieces") != (self.pieces is not None):
            raise ValueError(f"placement {self.placement} with pieces {self.pieces}")
        if self.placement == "pieces" and self.resize != "sum":
            raise ValueError(f"pieces take resize = sum; got {self.resize}")
        if self.placement == "per_rank" and self.resize == "keep":
            raise ValueError("a per_rank tensor needs resize = sum, mean or reset; got keep")
        if self.placement == "replica" and self.resize not in ("mean", "reset"):
            raise ValueError(f"a replica's tensor needs resize = mean or reset; got {self.resize}")


@dataclass
class State:
    """Named tensors and counters of one component. Counters are equal on all ranks."""

    tensors: dict[str, Placed] = field(default_factory=dict)
    counters: dict[str, Counter] = field(default_factory=dict)

    @classmethod
    def nested(cls, parts: Mapping[str, State]) -> State:
        """One state of several, every name with its part's in front: "PART.NAME". Local."""
        whole = cls()
        for name, part in parts.items():
            whole.tensors |= {f"{name}.{n}": placed for n, placed in part.tensors.items()}
            whole.counters |= {f"{name}.{n}": counter for n, counter in part.counters.items()}
        return whole

    def below(self, part: str) -> State:
        """One part of a `nested` state; empty where it has none. Local."""
        prefix = f"{part}."
        return State(
            {n.removeprefix(prefix): p for n, p in self.tensors.items() if n.startswith(prefix)},
            {n.removeprefix(prefix): c for n, c in self.counters.items() if n.startswith(prefix)},
        )


class Stateful(Protocol):
    """A component whose state goes into checkpoints."""

    def state(self) -> State:
        """The present state. Local. Tensors may alias live memory: the caller copies."""
        ...

    def load_state(self, state: State) -> None:
        """Take a state back. Local. Tensors absent from `state` (resize = reset) start afresh."""
        ...
