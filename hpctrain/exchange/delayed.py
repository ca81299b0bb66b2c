"""Delayed exchange: the sum of a step's gradients is applied `delay` steps later.

    at step t:  begin the sum over ranks of grad_r(w_t)
                grad <- the sum over ranks of grad_r(w_{t - d})

The sum has d = `delay` steps to arrive, so nobody waits for the network as long as it takes no
longer than they do. The first d steps only begin sums and leave the parameters alone; the sums of
the last d steps are never applied. A delay makes large step sizes diverge: [lr] kind = "stich"
lowers them by the rule for it. Memory: d copies of the gradient.

Source: delayed gradients with bounded delay are those of Stich, Mohtashami, Jaggi 2021, arXiv
2103.02351, algorithm 2, here with a constant delay on all ranks.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpctrain.errors import ConfigError
from hpctrain.exchange.setting import Setting
from hpctrain.exchange.table import ExchangeTable
from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import OptimiserConfig
from hpctrain.settings import Train
from hpctrain.state import Placed, State
from hpctrain.transport.communicator import Communicator, Handle


class Delayed(ExchangeTable):
    """[exchange] kind = "delayed"."""

    kind: Literal["delayed"] = "delayed"
    """Apply the sum of an earlier step, so that nobody waits for this one's."""
    delay: int = Field(default=1, ge=1)
    """Steps between taking a gradient and applying it."""

    gives: ClassVar[Literal["gradient"]] = "gradient"

    def comes_last(self, shape: torch.Size) -> bool:
        """No parameter is treated apart. Local."""
        return False

    def require_fit(self, train: Train, optimiser: OptimiserConfig) -> None:
        """Fits everything. Local."""

    def build(self, setting: Setting) -> DelayedExchange:
        """Collective. The running exchange."""
        comm = setting.comm.split(0, setting.comm.rank)
        assert comm is not None
        return DelayedExchange(setting.flat, comm, self.delay)


class DelayedExchange:
    """Runs the delayed exchange.

    Args:
        flat: The model; its flat gradient is replaced by an earlier step's sum.
        comm: The ranks that take part, for this object alone.
        delay: Steps.
    """

    gives: Literal["gradient", "update"] = "gradient"

    def __init__(self, flat: FlatModel, comm: Communicator, delay: int) -> None:
        self._flat, self._comm, self._delay = flat, comm, delay
        self._under_way: deque[tuple[Tensor, Handle | None]] = deque()
        self._spare: list[Tensor] = []
        self._taken: Tensor | None = None
        self.algorithm = f"{comm.algorithm}, applied {delay} step(s) later"
        self.bucket_names = ["gradient"]
        self.current = -1

    @property
    def ready(self) -> bool:
        """Whether there is a sum to apply after this step's `settle`."""
        return self._taken is not None

    def arm(self, lr: float = 1.0) -> None:
        """Nothing starts during backward. Local."""

    def disarm(self) -> None:
        """Nothing to take back. Local."""

    def finish(self) -> bool:
        """Collective. Begin this step's sum; wait for that of `delay` steps ago.

        Returns:
            Whether what has arrived, if anything, is finite.
        """
        grads_P = (
            self._spare.pop() if self._spare else torch.empty_like(self._flat.grads_P, device="cpu")
        )
        grads_P.copy_(self._flat.grads_P)
        self._under_way.append((grads_P, self._comm.iallreduce(grads_P.numpy())))
        self._taken = None
        if len(self._under_way) > self._delay:
            self._taken, handle = self._under_way.popleft()
            self.current = 0
            if handle is not None:
                handle.wait()
            self.current = -1
        return self._taken is None or bool(torch.isfinite(self._taken).all())

    def settle(self, *, keep: bool) -> None:
        """Local. The flat gradient becomes the sum that has arrived."""
        if self._taken is not None:
            self._flat.grads_P.copy_(self._taken)
            self._spare.append(self._taken)

    def tally(self) -> dict[str, float]:
        """Nothing beside the ledger's bytes and seconds. Local."""
        return {}

    def close(self) -> None:
        """Collective. Wait for what is under way."""
        self._complete()

    def state(self) -> State:
        """The sums under way, oldest first, equal on all ranks. Collective: waits for them."""
        self._complete()
        sums = {f"sum.{i}": Placed(grads_P) for i, (grads_P, _) in enumerate(self._under_way)}
        return State(sums, {"delay": self._delay})

    def load_state(self, state: State) -> None:
        """Take the sums back. Local.

        Raises:
            ConfigError: they are of another delay.
        """
        if state.counters.get("delay") != self._delay:
            raise ConfigError(
                f"the checkpoint has gradients under way for exchange.delay = "
                f"{state.counters.get('delay')}; this run has {self._delay}. Resume with the "
                "[exchange] table the run was started with"
            )
        self._under_way.clear()
        for index in range(len(state.tensors)):
            self._under_way.append((state.tensors[f"sum.{index}"].tensor.clone(), None))

    def _complete(self) -> None:
        for _, handle in self._under_way:
            if handle is not None:
                handle.wait()
