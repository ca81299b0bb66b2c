"""All shards of a model: their shared memory, their feedback, what their exchanges agreed on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpctrain.compress.feedback import Feedback
from hpctrain.compress.feedback_device import AnyFeedback, DeviceFeedback
from hpctrain.exchange.buckets import Bucket
from hpctrain.exchange.counts import largest_density
from hpctrain.exchange.parties import Agreed, Parties
from hpctrain.exchange.setting import Setting
from hpctrain.exchange.shard import KINDS, Shard, ShardPlan, plan_shards
from hpctrain.exchange.whole import Whole

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
            self.kind = "gather" if parties.count == 2 else "owner"
        self._rule = setting.local_rule(
            config.gives, parties.count, feedback=config.feedback, masking=config.masking
        )
        self._clip_norm = setting.optimiser.clip_norm if self._rule.clips else None
        self._on_host = setting.on_host
        grad_bytes = 4 * setting.flat.n_params if self._on_host else 0
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
        if self._on_host:
            setting.flat.place_gradients(torch.from_numpy(self._gradients[parties.inside.rank]))
        self.by_bucket = [
            [self._make(plan, place) for place, plan in enumerate(shards)] for shards in plans
        ]
        self.mine = [
            None if parties.place is None else shards[parties.place] for shards in self.by_bucket
        ]
        """This rank's shard of each bucket."""
        self.largest = max((plan.n for shards in plans for plan in shards), default=0)

    def post(self, bucket: int, outcome: Agreed, grad_sq: float, xi: Sequence[float]) -> None:
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
        posted = np.array(self._boards)
        finite, residual_sq, grad_sq, _, error_sq, fresh_sq = posted.sum(axis=(0, 1))
        return Board(
            bool(finite == posted.shape[0] * posted.shape[1]),
            float(residual_sq),
            float(grad_sq),
            posted[:, :, 3].T,
            math.sqrt(error_sq / fresh_sq) if fresh_sq else math.nan,
        )

    def clip_factor(self, grad_sq: float) -> float:
        """What the next fresh gradient of this party is multiplied with. Local."""
        if self._clip_norm is None or not 0.0 < grad_sq < math.inf:
            return 1.0
        return min(1.0, self._clip_norm / math.sqrt(self._parties.count * grad_sq))

    def tally(self, whole: Sequence[bool], board: Board) -> dict[str, float]:
        """What the record tells of a step. Local.

        Args:
            whole: Which buckets were summed whole.
            board: What was posted.
        """
        entries, nbytes = 0, 0.0
        size, coding, kind = self._parties.count, self._config.coding, KINDS[self.kind]
        for shards, all_of_it in zip(self.by_bucket, whole, strict=True):
            for shard in shards:
                entries += shard.plan.n if all_of_it else shard.count
                if all_of_it:
                    nbytes += Whole.sent_bytes(size, shard.plan.n)
                else:
                    nbytes += kind.sent_bytes(size, coding, shard.count)
        told = {"density": entries / self._flat.n_params, "bytes_formula": nbytes}
        if not math.isnan(board.residual_sq):
            told["residual_norm"] = math.sqrt(board.residual_sq)
        if not math.isnan(board.xi):
            told["xi"] = board.xi
        return told

    def describe(self) -> str:
        """What is done here, for people. Local."""
        config = self._config
        if self._parties.count == 1:
            return "one node: everything is summed in shared memory"
        return (
            f"{self.kind} of {config.density:.3g} of the entries per "
            f"{'node' if config.hierarchy else 'rank'}, {config.index} and {config.values}"
            f"{', velocities masked' if self._rule.masking else ''}"
        )

    def close(self) -> None:
        """Collective over the party. Frees the shared memory."""
        if self._on_host:
            self._flat.place_gradients(torch.zeros_like(self._flat.params_P))
        self.by_bucket, self.mine, self._gradients, self._boards = [], [], [], []
        self.memory.close()

    def _make(self, plan: ShardPlan, place: int) -> Shard:
        parties, where = self._parties, slice(plan.start, plan.stop)
        mine = place == parties.place
        inbox = self.memory.slices[place][plan.inbox]
        if not plan.count:
            sum_N = inbox.view(np.float32)
        elif self._on_host:
            sum_N = self._gradients[place][where]
        else:
            sum_N = np.zeros(plan.n, np.float32)
        shard = Shard(plan, place, sum_N, None)
        if plan.count:
            me = parties.across.rank if mine else None
            kind = KINDS[self.kind]
            shard.sparse = kind(plan.n, parties.count, self._config.coding, inbox, me)
        if mine:
            shard.feedback = self._feedback(plan, place, sum_N)
        return shard

    def _feedback(self, plan: ShardPlan, place: int, sum_N: np.ndarray) -> AnyFeedback:
        flat, where, waits = self._flat, slice(plan.start, plan.stop), plan.count > 0
        params_N, grads = flat.params_P[where], self._gradients
        if not self._on_host:
            grad_N = flat.grads_P[where]
            return DeviceFeedback(self._rule, grad_N, params_N, sum_N, waits=waits)
        others = [grad[where] for rank, grad in enumerate(grads) if rank != place]
        all_N = None if waits else sum_N
        return Feedback(self._rule, grads[place][where], others, params_N.numpy(), all_N)
