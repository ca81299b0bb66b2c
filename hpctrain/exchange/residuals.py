"""The residuals and velocities of all shards as tensors of a checkpoint.

At the same parties and shards they come back bit by bit. Otherwise each new party takes the sum of
the old ones that come to it (`state.Pieces`), with what owners had pending added to the residuals:
the sum of all that waits is conserved, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpctrain.exchange.parties import Parties
from hpctrain.exchange.shard import Shard
from hpctrain.state import Pieces, Placed, Span, State


def state_of(shards: Sequence[Shard | None], parties: Parties) -> dict[str, Placed]:
    """Residuals (with what owners have pending) and velocities of this rank's shards. Local."""
    residuals: list[torch.Tensor] = []
    velocities: list[torch.Tensor] = []
    pending: list[torch.Tensor] = []
    moving: list[Span] = []
    spare: list[Span] = []
    for shard in shards:
        if shard is None or shard.feedback is None:
            continue
        here = Span.whole(shard.plan.start, shard.plan.stop)
        residual, velocity = shard.feedback.stored()
        moving.append(here)
        residuals.append(residual)
        velocities.append(velocity)
        if shard.sparse is not None:
            values, where = shard.sparse.pending(shard.plan.start)
            pending.append(torch.from_numpy(values).to(residual.device))
            spare.extend(where)
    pieces = Pieces(parties.mine, parties.count, (*moving, *spare), len(spare))
    joined = torch.cat([torch.empty(0), *residuals, *pending])
    placed = {"residual": Placed(joined, "pieces", "sum", pieces)}
    if any(len(velocity) for velocity in velocities):
        pieces = Pieces(parties.mine, parties.count, tuple(moving))
        placed["velocity"] = Placed(torch.cat(velocities), "pieces", "sum", pieces)
    return placed


def load_into(shards: Sequence[Shard | None], state: State) -> None:
    """Copy a state's values into the shards' live memory. Local."""
    residual = state.tensors["residual"].tensor
    velocity = state.tensors["velocity"].tensor if "velocity" in state.tensors else None
    mine = [shard for shard in shards if shard is not None]
    at = moved = 0
    for shard in mine:
        feedback = shard.feedback
        assert feedback is not None
        own_residual, own_velocity = feedback.stored()
        end, moving = at + len(own_residual), moved + len(own_velocity)
        feedback.load(residual[at:end], None if velocity is None else velocity[moved:moving])
        at, moved = end, moving
    for shard in mine:
        if shard.sparse is not None:
            values, _ = shard.sparse.pending(shard.plan.start)
            values[:] = residual[at : at + len(values)].numpy()
            at += len(values)
