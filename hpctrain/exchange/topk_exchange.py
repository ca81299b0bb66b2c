"""Runs the top-k exchange of one model; `topk.Topk.build` makes it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from hpctrain.compress.select import Selector
from hpctrain.errors import ConfigError
from hpctrain.exchange import residuals
from hpctrain.exchange.apply import Target, apply_results
from hpctrain.exchange.buckets import buckets_with_small
from hpctrain.exchange.choice import Choice
from hpctrain.exchange.lane import Lane
from hpctrain.exchange.parties import Agreed, Parties
from hpctrain.exchange.ready import ReadyBuckets
from hpctrain.exchange.setting import Setting
from hpctrain.exchange.shards import Shards
from hpctrain.exchange.whole import Whole
from hpctrain.exchange.xi import measured
from hpctrain.state import Placed, State
from hpctrain.transport.communicator import Handle

if TYPE_CHECKING:
    from hpctrain.exchange.topk import TopkSettings


_WATCH_EVERY = 10
"""Steps between two residual norms in the record."""
_THREADED_FROM = 1 << 18
"""With fewer parameters a thread for the buckets costs more than it hides."""


class TopkExchange:
    """The top-k exchange. Collective to make.

    On return the model's gradients lie in memory that the node's ranks share.

    Args:
        config: The [exchange] table.
        setting: Model, ranks and update rule.

    Raises:
        ConfigError: the model is not float32.
    """

    def __init__(self, config: TopkSettings, setting: Setting) -> None:
        self.gives, self.ready = config.gives, True
        self._config, self._comm, self._flat = config, setting.comm, setting.flat
        flat = setting.flat
        if flat.params_P.dtype != torch.float32:
            raise ConfigError(f"top-k sends float32 gradients; the model is {flat.params_P.dtype}")
        self._buckets = buckets_with_small(
            flat.names,
            [where.stop - where.start for where in flat.slices],
            [config.comes_last(shape) for shape in flat.shapes],
            flat.grads_P.element_size(),
            int(config.bucket_mib * 2**20),
        )
        self.bucket_names = [bucket.name for bucket in self._buckets]
        self._parties = Parties(setting.comm, by_node=config.hierarchy and setting.on_host)
        self._shards = Shards(config, setting, self._buckets, self._parties)
        self._choice = Choice(config, self._shards, self._parties, self._parties.everyone)
        selects = self._parties.count > 1
        self._selector = Selector(
            max(self._shards.largest, 1), kernel=config.kernel if selects else "numpy"
        )
        self._whole = Whole()
        self._lane = Lane(threaded=flat.n_params >= _THREADED_FROM and setting.comm.any_thread)
        self._ready = ReadyBuckets(
            flat, self._buckets, lambda bucket: self._lane.start(bucket, self._task(bucket))
        )
        self._step = 0
        self._lr = math.nan
        self._exposed_s = 0.0
        self._clip = 1.0
        self._told: dict[str, float] = {}
        self.algorithm = self._shards.describe()
        if selects and setting.on_host:
            self.algorithm += f", picked with {self._selector.kernel}"

    @property
    def current(self) -> int:
        """The bucket that is being waited for, -1 when none."""
        return self._lane.current

    def arm(self, lr: float = 1.0) -> None:
        """Say that the next backward pass is the step's last. Local."""
        self._lr = lr if self.gives == "update" else 1.0
        self._choice.begin(self._step)
        self._lane.in_turn = self._choice.measures
        self._ready.arm()

    def disarm(self) -> None:
        """Take `arm` back: the next backward pass only adds to the gradient. Local."""
        self._ready.disarm()

    def finish(self) -> bool:
        """Collective. Complete all buckets; whether everything was finite on all ranks."""
        if not self._ready.armed:
            raise RuntimeError("finish() without arm(lr): this step's lr is unknown")
        began = time.perf_counter()
        self._ready.finish()
        self._lane.finish()
        self._shards.memory.fence()
        self._exposed_s = time.perf_counter() - began
        self._parties.count_into(self._comm.ledger, self._exposed_s)
        self._board = self._shards.board()
        return self._board.finite

    def settle(self, *, keep: bool) -> None:
        """Collective. Commit the residuals and apply the result, or undo the step."""
        for bucket, shard in enumerate(self._shards.mine):
            if shard is None or shard.feedback is None:
                continue
            if keep:
                shard.feedback.commit(sent_all=self._choice.whole[bucket])
            elif shard.sparse is not None and not self._choice.whole[bucket]:
                shard.sparse.undo()
        if keep:
            flat, updates = self._flat, self.gives == "update"
            target = Target(flat.params_P if updates else flat.grads_P, self.gives)
            apply_s = apply_results(target, self._shards.by_bucket, self._choice.whole, self._step)
            self._clip = self._shards.clip_factor(self._board.grad_sq)
            self._told = self._shards.tally(self._choice.whole, self._board)
            self._told |= self._choice.tally()
            self._choice.settle(self._board.wanted, self._exposed_s, self._lane.seconds, apply_s)
        if self._choice.sums_in_gradients:
            # A neighbour may still read a sum here, which the next backward overwrites.
            self._shards.memory.fence()
        self._step += 1

    def tally(self) -> dict[str, float]:
        """Numbers of the last step, for metrics.jsonl, equal on all ranks. Local."""
        return self._told

    def close(self) -> None:
        """Collective. Remove the hooks, end the thread, free the shared memory."""
        self._ready.close()
        self._lane.close()
        self._shards.close()

    def state(self) -> State:
        """Residuals (with what owners have pending) and velocities. Local."""
        tensors = residuals.state_of(self._shards.mine, self._parties)
        tensors["clip"] = Placed(torch.tensor([self._clip]), "per_rank", "reset")
        counters = self._choice.counters()
        counters |= {"step": self._step, "gives": self.gives, "layout": ",".join(self._flat.names)}
        return State(tensors, counters)

    def load_state(self, state: State) -> None:
        """Copy a state's values into the live memory. Local.

        Raises:
            ConfigError: the state is of another exchange or of another order of parameters.
        """
        expected = {"gives": self.gives, "layout": ",".join(self._flat.names)}
        for name, value in expected.items():
            if state.counters.get(name) != value:
                raise ConfigError(
                    f"the checkpoint holds no residuals for this exchange: {name} is "
                    f"{state.counters.get(name)}, not {value}. Resume with the [exchange] and "
                    "[model] tables the run was started with"
                )
        self._step = int(state.counters["step"] or 0)
        if "clip" in state.tensors:
            self._clip = float(state.tensors["clip"].tensor)
        residuals.load_into(self._shards.mine, state)
        self._choice.load_counters(state.counters)

    def _task(self, bucket: int) -> Iterator[Handle]:
        """Collective. The exchange of one bucket."""
        self._shards.memory.fence()
        shard = self._shards.mine[bucket]
        if shard is None or shard.feedback is None:
            return
        feedback, phases, xi = shard.feedback, self._parties.phases, [0.0, 0.0]
        # The next step's messages tell it.
        feedback.begin(self._lr, self._clip, watch=(self._step + 2) % _WATCH_EVERY == 0)
        outcome: Agreed
        if self._choice.whole[bucket] or shard.sparse is None:
            outcome = yield from self._whole.exchange(feedback, phases)
        else:
            every = self._config.xi_every
            outcome, *xi = yield from measured(
                shard.sparse,
                feedback,
                self._selector,
                phases,
                step=self._step,
                bucket=bucket,
                count=shard.count,
                wanted=self._choice.wanted(feedback),
                measure=every > 0 and self._step % every == 0,
            )
        self._shards.post(bucket, outcome, feedback.grad_sq, xi)
