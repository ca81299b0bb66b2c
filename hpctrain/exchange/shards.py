"""All shards of a model: their shared memory, their feedback, what their exchanges agreed on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpctrain.compress.feedback import Feedback, LocalRule
from hpctrain.exchange.buckets import Bucket
from hpctrain.exchange.counts import largest_density
from hpctrain.exchange.parties import Agreed, Parties
from hpctrain.exchange.setting import Setting
from hpctrain.exchange.shard import KINDS, Shard, ShardPlan, plan_shards
from hpctrain.optimiser import Sgd

if TYPE_CHECKING:
    from hpctrain.exchange.topk import TopkSettings

_COLUMNS = 6
_ALIGN = 64


@dataclass(frozen=True)
class Board:
    """What the exchanges of all shards agreed on, and this party's norm."""

    finite: bool
    residual_sq: float
    """Sum over parties and entries."""
    grad_sq: float
    """Of this party's fresh gradient, where clipping needs it."""
    wanted: np.ndarray
    """(buckets, places): mean over parties of the entries they want to send."""
    xi: float
    """See `xi`; NaN where it was not measured."""


class Shards:
    """The shards. Collective to make; moves the model's gradients into shared memory.

    Args:
        config: The [exchange] table.
        setting: Model, ranks and update rule.
        buckets: In index order.
        parties: Who compresses.
    """

    def __init__(
        self, config: TopkSettings, setting: Setting, buckets: Sequence[Bucket], parties: Parties
    ) -> None:
        self._config, self._parties, self._flat = config, parties, setting.flat
        self.kind = config.algorithm
        if self.kind == "auto":
            self.kind = "gather" if parties.count == 2 else "exclusive"
        self._rule = local_rule(config, setting, parties.count)
        self._clip_norm = setting.optimiser.clip_norm if self._rule.clips else None
        grad_bytes = 4 * setting.flat.n_params
        board_start = -(-grad_bytes // _ALIGN) * _ALIGN
        board_bytes = 8 * _COLUMNS * len(buckets)
        plans = plan_shards(
            config,
            self.kind,
            largest_density(config, self.kind, parties.count),
            buckets,
            [config.comes_last(setting.flat.shapes[bucket.parameters[0]]) for bucket in buckets],
            parties.count,
            parties.places,
            -(-(board_start + board_bytes) // _ALIGN) * _ALIGN,
        )
        nbytes = max((plan.inbox.stop for shards in plans for plan in shards), default=0)
        self.memory = parties.memory(max(nbytes, board_start + board_bytes))
        self._gradients = [part[:grad_bytes].view(np.float32) for part in self.memory.slices]
        self._boards = [
            part[board_start : board_start + board_bytes].view(np.float64).reshape(-1, _COLUMNS)
            for part in self.memory.slices[: parties.places]
        ]
        setting.flat.place_gradients(torch.from_numpy(self._gradients[parties.inside.rank]))
        self.by_bucket = [
            [self._make(plan, place) for place, plan in enumerate(shards)] for shards in plans
        ]
        self.mine = [
            None if parties.place is None else shards[parties.place] for shards in self.by_bucket
        ]
        """This rank's shard of each bucket."""
        self.largest = max((plan.n for shards in plans for plan in shards), default=0)

    def post(self, bucket: int, outcome: Agreed, grad_sq: float, xi: tuple[float, float]) -> None:
        """Tell the party's ranks how this rank's shard of `bucket` went. Local.

        Args:
            bucket: Its number.
            outcome: What its messages said.
            grad_sq: Sum of squares of its fresh gradient.
            xi: Squares of the numerator and the denominator.
        """
        place = self._parties.place
        assert place is not None
        row = (outcome.finite, outcome.residual_sq, grad_sq, outcome.wanted, *xi)
        self._boards[place][bucket] = row

    def board(self) -> Board:
        """All that was posted; after a fence equal on a party's ranks. Local."""
        posted = np.stack(self._boards, axis=1)
        finite, residual_sq, grad_sq, _, error_sq, fresh_sq = posted.sum(axis=(0, 1))
        return Board(
            finite == posted.shape[0] * posted.shape[1],
            float(residual_sq),
            float(grad_sq),
            posted[:, :, 3].copy(),
            math.sqrt(error_sq / fresh_sq) if fresh_sq else math.nan,
        )

    def clip_factor(self, grad_sq: float) -> float:
        """What the next fresh gradient of this party is multiplied with. Local."""
        if self._clip_norm is None or grad_sq == 0.0:
            return 1.0
        return min(1.0, self._clip_norm / math.sqrt(self._parties.count * grad_sq))

    def volume(self, whole: Sequence[bool]) -> tuple[int, float]:
        """Entries and bytes that a party sends per step by formula. Local.

        Args:
            whole: Which buckets are summed whole.
        """
        entries, nbytes = 0, 0.0
        size, coding, kind = self._parties.count, self._config.coding, KINDS[self.kind]
        for shards, all_of_it in zip(self.by_bucket, whole, strict=True):
            for shard in shards:
                entries += shard.plan.n if all_of_it else shard.count
                nbytes += (
                    8 * shard.plan.n * (size - 1) / size
                    if all_of_it
                    else kind.sent_bytes(size, coding, shard.count)
                )
        return entries, nbytes

    def describe(self) -> str:
        """What is done here, for people. Local."""
        config = self._config
        if self._parties.count == 1:
            return "one node: everything is summed in shared memory"
        return (
            f"{self.kind} of {config.density:.3g} of the entries per "
            f"{'node' if config.hierarchy else 'rank'}, {config.index} and {config.values}"
        )

    def close(self) -> None:
        """Collective over the party. Frees the shared memory."""
        self.by_bucket, self.mine, self._gradients, self._boards = [], [], [], []
        self.memory.close()

    def _make(self, plan: ShardPlan, place: int) -> Shard:
        parties, where = self._parties, slice(plan.start, plan.stop)
        mine = place == parties.place
        grad_N = self._gradients[place][where]
        inbox = self.memory.slices[place][plan.inbox]
        sum_N = grad_N if plan.count else inbox.view(np.float32)
        sparse = feedback = None
        if plan.count:
            me = parties.across.rank if mine else None
            sparse = KINDS[self.kind](plan.n, parties.count, self._config.coding, inbox, me)
        if mine:
            others = [g[where] for rank, g in enumerate(self._gradients) if rank != place]
            params_N = self._flat.params_P.numpy()[where]
            feedback = Feedback(self._rule, grad_N, others, params_N, None if plan.count else sum_N)
        return Shard(plan, place, sum_N, sparse, feedback)


def local_rule(config: TopkSettings, setting: Setting, parties: int) -> LocalRule:
    """What of the optimiser's rule comes before selection. Local.

    Raises:
        ConfigError: the exchange gives updates, and the optimiser's rule is not local.
    """
    if config.gives == "gradient":
        return LocalRule(feedback=config.feedback)
    sgd = setting.optimiser
    assert isinstance(sgd, Sgd)
    return LocalRule(
        momentum=sgd.momentum,
        nesterov=sgd.nesterov,
        weight_decay=sgd.weight_decay / parties,
        feedback=config.feedback,
        clips=sgd.clip_norm is not None,
    )
