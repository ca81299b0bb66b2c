"""Runs the top-k exchange of one model; `topk.Topk.build` makes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from hpctrain.compress.select import Selector
from hpctrain.errors import ConfigError
from hpctrain.exchange import residuals
from hpctrain.exchange.apply import add_results, subtract_results
from hpctrain.exchange.buckets import buckets_with_small
from hpctrain.exchange.lane import Lane
from hpctrain.exchange.parties import Agreed, Parties
from hpctrain.exchange.ready import ReadyBuckets
from hpctrain.exchange.setting import Setting
from hpctrain.exchange.shards import Shards
from hpctrain.exchange.whole import Whole
from hpctrain.state import Placed, State
from hpctrain.transport.communicator import Handle

if TYPE_CHECKING:
    from hpctrain.exchange.topk import Topk


class TopkExchange:
    """The top-k exchange. Collective to make.

    On return the model's gradients lie in memory that the node's ranks share.

    Args:
        config: The [exchange] table.
        setting: Model, ranks and update rule.

    Raises:
        ConfigError: the model is not float32.
    """

    def __init__(self, config: Topk, setting: Setting) -> None:
        self.gives: Literal["gradient", "update"] = config.gives
        self._config, self._comm, self._flat = config, setting.comm, setting.flat
        if self._flat.params_P.dtype != torch.float32:
            raise ConfigError(
                'exchange.kind = "topk" sends float32 gradients; train.dtype is '
                f'"{str(self._flat.params_P.dtype).removeprefix("torch.")}"'
            )
        sizes = [where.stop - where.start for where in self._flat.slices]
        small = [config.comes_last(shape) for shape in self._flat.shapes]
        self._buckets = buckets_with_small(
            self._flat.names, sizes, small, 4, int(config.bucket_mib * 2**20)
        )
        self.bucket_names = [bucket.name for bucket in self._buckets]
        self._parties = Parties(setting.comm, by_node=config.hierarchy)
        self._shards = Shards(config, setting, self._buckets, self._parties)
        self._selector = Selector(max(self._shards.largest, 1))
        self._whole = Whole()
        self._lane = Lane(threaded=setting.comm.any_thread and setting.comm.size > 1)
        self._ready = ReadyBuckets(self._flat, self._buckets, self._start)
        self._step = 0
        self._lr = 1.0
        self._clip = 1.0
        self._told: dict[str, float] = {}
        self.algorithm = self._describe()

    @property
    def current(self) -> int:
        """The bucket that is being waited for, -1 when none."""
        return self._lane.current

    def arm(self, lr: float = 1.0) -> None:
        """Say that the next backward pass is the step's last. Local."""
        self._lr = lr if self.gives == "update" else 1.0
        self._ready.arm()

    def disarm(self) -> None:
        """Take `arm` back: the next backward pass only adds to the gradient. Local."""
        self._ready.disarm()

    def finish(self) -> bool:
        """Collective. Complete all buckets; whether everything was finite on all ranks."""
        self._ready.finish()
        self._lane.finish()
        self._shards.memory.fence()
        self._collect_bytes()
        self._board = self._shards.board()
        return self._board.finite

    def settle(self, *, keep: bool) -> None:
        """Collective. Commit the residuals and apply the result, or undo the step."""
        for bucket, shard in enumerate(self._shards.mine):
            if shard is None:
                continue
            assert shard.feedback is not None
            if keep:
                shard.feedback.commit(sent_all=self._is_whole(bucket))
            elif shard.sparse is not None and not self._is_whole(bucket):
                shard.sparse.undo()
        if keep:
            self._apply()
            self._tell()
        # A neighbour may still read this rank's part of a sum, which the next backward overwrites.
        self._shards.memory.fence()
        self._step += 1

    def tally(self) -> dict[str, float]:
        """density, residual_norm and bytes_formula of the last step. Local."""
        return self._told

    def close(self) -> None:
        """Collective. Remove the hooks, end the thread, free the shared memory."""
        self._ready.close()
        self._lane.close()
        self._flat.place_gradients(torch.zeros_like(self._flat.params_P))
        self._shards.close()

    def state(self) -> State:
        """Residuals, velocities and what owners have not sent, aliasing live memory. Local."""
        tensors = residuals.state_of(self._shards.mine, self._parties)
        tensors["clip"] = Placed(torch.tensor([self._clip]), "per_rank", "reset")
        return State(tensors, {"step": self._step, "layout": ",".join(self._flat.names)})

    def load_state(self, state: State) -> None:
        """Copy a state's values into the live memory. Local.

        Raises:
            ConfigError: the state is of another exchange or of another order of parameters.
        """
        if state.counters.get("layout") != ",".join(self._flat.names):
            raise ConfigError(
                "the stored residuals do not belong to this exchange: its order of parameters is "
                "another. Resume with the [exchange] and [model] tables the run was started with"
            )
        self._step = int(state.counters["step"] or 0)
        if "clip" in state.tensors:
            self._clip = float(state.tensors["clip"].tensor)
        residuals.load_into(self._shards.mine, state)

    def _start(self, bucket: int) -> None:
        self._lane.start(bucket, self._task(bucket))

    def _task(self, bucket: int) -> Iterator[Handle]:
        """Collective. The exchange of one bucket."""
        self._shards.memory.fence()
        shard = self._shards.mine[bucket]
        if shard is None:
            return
        feedback = shard.feedback
        assert feedback is not None
        feedback.begin(self._lr, self._clip)
        phases = self._parties.phases
        outcome: Agreed
        if self._is_whole(bucket):
            outcome = yield from self._whole.exchange(feedback, phases)
        else:
            assert shard.sparse is not None
            outcome = yield from shard.sparse.exchange(
                self._step, bucket, feedback, self._selector, 0, phases
            )
        self._shards.post(bucket, outcome, feedback.grad_sq)

    def _is_whole(self, bucket: int) -> bool:
        return (
            self._step < self._config.warmup_steps
            or self._shards.by_bucket[bucket][0].sparse is None
        )

    def _apply(self) -> None:
        results = [
            (bucket, shard, None if self._is_whole(bucket) else shard.sparse)
            for bucket, shards in enumerate(self._shards.by_bucket)
            for shard in shards
        ]
        if self.gives == "update":
            subtract_results(self._flat.params_P.numpy(), results, self._step)
            self._clip = self._shards.clip_factor(self._board.norm_sq)
        else:
            own = self._parties.place
            add_results(self._flat.grads_P.numpy(), results, self._step, own)

    def _tell(self) -> None:
        whole = [self._is_whole(bucket) for bucket in range(len(self._buckets))]
        sent, nbytes = self._shards.volume(whole)
        self._told = {
            "density": sent / self._flat.n_params,
            "residual_norm": float(np.sqrt(self._board.residual_sq)),
            "bytes_formula": nbytes,
        }

    def _collect_bytes(self) -> None:
        counted = self._parties.ledger
        self._comm.ledger.add(
            intra=counted.bytes_sent_intra, inter=counted.bytes_sent_inter, source=counted.source
        )
        counted.bytes_sent_intra = counted.bytes_sent_inter = 0

    def _describe(self) -> str:
        parties, config = self._parties, self._config
        if parties.count == 1:
            return "one node: everything is summed in shared memory"
        who = "node" if config.hierarchy else "rank"
        return (
            f"{self._shards.kind} of {config.density:.3g} of the entries per {who}, "
            f"{config.index} and {config.values}"
        )
