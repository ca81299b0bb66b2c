"""Quantised exchange: every entry of the gradient crosses the network as 1 to 8 bits.

Per step, with g_r the gradient of rank r, already divided by the global batch:

    a_r  <- g_r + e_r                      e_r: this rank's residual
    sent <- read(write(a_r))               signs or levels, see compress/quantiser
    e_r  <- a_r - sent
    g    <- sum over ranks of sent         added in rank order: bitwise equal on all ranks

Parameters of one dimension or of less than a chunk are dense, summed in one buffer. One rank alone
sends nothing and loses nothing: g is a_r, e_r is 0. `feedback = false` leaves e out.

Error feedback is on the sum over ranks, and every factor in it is 1: sum of e_r + g = sum of g_r +
sum of the e_r before. Residuals are in units of the gradient: the lr of the step that sends them
multiplies them.

Source: "sign": EF-signSGD, Karimireddy, Rebjock, Stich, Jaggi 2019 (arXiv 1901.09847, Algorithm 1),
without the lr inside the residual; chunks instead of layers have a scale. "qsgd": Alistarh et al.
2017 (arXiv 1610.02132, section 3), which has no feedback; with it the levels take their best scale
instead of the unbiased one. The random numbers of a step follow from rank and step alone, so the
step count is all that a resumed run needs of the generators.

Cost per step and rank, on rings: (P-1) chunks (4 + chunk bits / 8) + 2(P-1)/P * 4 (2 + dense
entries) bytes: less than dense as long as P < 64 / bits, about (signs up to 60 ranks, 4 bits up to
15). Every rank reads P messages. In the other known form each rank sums one slice, quantises the
sum again and passes it on: 2(P-1)/P messages whatever P, fewer from 3 ranks on, for a second
rounding and a second round trip; this method is here for comparison, and has one form only.
Extra memory: 3 floats per quantised entry (residual, accumulator, sum), and P + 1 messages.
Everything is done in `finish` and `settle`, nothing during backward, on the host: on a GPU the
gradient is copied to the host and back. The model is float32.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from hpctrain.compress.quantiser import Quantiser, Scheme
from hpctrain.exchange.parts import (
    Parts,
    adopt_gradients,
    all_finite,
    require_float32,
    require_float32_model,
    take_back,
)
from hpctrain.exchange.setting import Setting
from hpctrain.exchange.table import ExchangeTable
from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import OptimiserConfig
from hpctrain.settings import Train
from hpctrain.state import Counter, Placed, State
from hpctrain.transport.communicator import Communicator, Handle

_HEADER = 2
"""Of the dense sum: how many ranks saw inf or NaN, and the squares of their residuals."""


class Quantise(ExchangeTable):
    """[exchange] kind = "quantise": few bits per entry of the gradient."""

    gives: ClassVar[Literal["gradient"]] = "gradient"
    kind: Literal["quantise"] = "quantise"
    """Gather quantised gradients from all ranks and add them up, with error feedback."""
    scheme: Scheme = "sign"
    """Signs with the mean magnitude, or levels drawn at random between zero and the largest."""
    bits: Literal[1, 2, 4, 8] = 1
    """Per entry: 1 with scheme "sign"; 2, 4 or 8 with "qsgd"."""
    chunk: int = Field(default=512, ge=32, multiple_of=32)
    """Entries that share a scale; 4 bytes each."""
    feedback: bool = True
    """Keep what is rounded away for later steps; without it, it is lost."""

    @model_validator(mode="after")
    def _bits_of_scheme(self) -> Quantise:
        if (self.scheme == "sign") != (self.bits == 1):
            allowed = "bits = 1" if self.scheme == "sign" else "bits = 2, 4 or 8"
            raise ValueError(f'scheme = "{self.scheme}" takes {allowed}; got bits = {self.bits}')
        return self

    def comes_last(self, shape: torch.Size) -> bool:
        """No parameter needs a special place. Local."""
        return False

    def require_fit(self, train: Train, optimiser: OptimiserConfig) -> None:
        """Local. ValueError where the tables [train] and [optimiser] do not fit this one."""
        require_float32(self.kind, train.dtype)

    def build(self, setting: Setting) -> QuantiseExchange:
        """Collective. The running exchange; ConfigError where the model is not float32."""
        require_float32_model(self.kind, setting.flat)
        comm = setting.comm.split(0, setting.comm.rank)
        assert comm is not None
        return QuantiseExchange(self, setting.flat, comm)


class QuantiseExchange:
    """Runs the quantised exchange of one float32 model, over a communicator of its own."""

    gives: Literal["gradient", "update"] = "gradient"
    ready = True

    def __init__(self, config: Quantise, flat: FlatModel, comm: Communicator) -> None:
        self.bucket_names = ["dense parameters", "quantised parameters"]
        self.current = -1
        self._config, self._flat, self._comm = config, flat, comm
        coarse = [len(s) > 1 and s.numel() >= config.chunk for s in flat.shapes]
        pairs = list(zip(flat.slices, coarse, strict=True))
        self._dense = Parts(where for where, quantised in pairs if not quantised)
        self._coarse = Parts(where for where, quantised in pairs if quantised)
        self._quantiser = Quantiser(
            self._coarse.n, config.scheme, config.bits, config.chunk, not config.feedback
        )
        padded = self._quantiser.padded
        self._first = torch.zeros(_HEADER + self._dense.n)
        self._acc, self._total = torch.zeros(padded), torch.zeros(padded)
        self._residual = torch.zeros(padded if config.feedback else 0)
        self._message = np.zeros(self._quantiser.message_bytes, np.uint8)
        self._messages = np.zeros((comm.size, len(self._message)), np.uint8)
        self._steps = 0
        self._residual_norm = 0.0
        self.algorithm = (
            f"{config.scheme}, {config.bits}-bit for {self._coarse.n:,} entries, "
            f"{self._dense.n:,} entries dense; all-gather, sum in rank order"
        )

    def arm(self, lr: float = 1.0) -> None:
        """Nothing happens during backward. Local."""

    def disarm(self) -> None:
        """Nothing happens during backward. Local."""

    def finish(self) -> bool:
        """Collective. Send, receive and add up; the residual stays as it is until `settle`."""
        adopt_gradients(self._flat)
        self._coarse.gather(self._flat.grads_P, self._acc)
        self._dense.gather(self._flat.grads_P, self._first[_HEADER:])
        if self._config.feedback:
            self._acc += self._residual
        finite = all_finite(self._acc)
        self._first[0] = float(not finite)
        self._first[1] = torch.dot(self._residual, self._residual)
        if finite and self._comm.size > 1:
            random = np.random.default_rng((self._comm.rank, self._steps))
            self._quantiser.write(self._acc.numpy(), self._message, random)
        handles: list[Handle] = [
            self._comm.iallreduce(self._first.numpy()),
            self._comm.iallgather(self._message, self._messages),
        ]
        for self.current, handle in enumerate(handles):
            handle.wait()
        self.current = -1
        # What decides is equal on all ranks: a sum over them, and what all of them received.
        if not all_finite(self._first) or float(self._first[0]):
            return False
        self._residual_norm = math.sqrt(float(self._first[1]))
        total_N, acc_N = self._total.numpy(), self._acc.numpy()
        if self._comm.size > 1:
            return self._quantiser.add_up(self._messages, total_N, self._comm.rank, acc_N)
        total_N[:] = acc_N
        acc_N[:] = 0.0
        return True

    def settle(self, *, keep: bool) -> None:
        """Local. Fill in the gradient and take over the residual, or leave it as it was.

        Without `keep` the flat gradient holds no sum afterwards.
        """
        if not keep:
            return
        self._coarse.scatter(self._total, self._flat.grads_P)
        self._dense.scatter(self._first[_HEADER:], self._flat.grads_P)
        if self._config.feedback:
            self._acc, self._residual = self._residual, self._acc
        self._steps += 1

    def tally(self) -> dict[str, float]:
        """Local. Root of the sum over ranks of the squared residuals that the step began with."""
        return {"residual_norm": self._residual_norm}

    def close(self) -> None:
        """Nothing to end. Local."""

    def state(self) -> State:
        """Residuals per rank, conserved in sum when the ranks change in number; steps."""
        counters: dict[str, Counter] = {"steps": self._steps}
        if not self._config.feedback:
            return State(counters=counters)
        residual = self._residual[: self._coarse.n]
        return State({"residual": Placed(residual, "per_rank", "sum")}, counters)

    def load_state(self, state: State) -> None:
        """Local. Take a state back; ConfigError where it is of other settings or another model."""
        take_back("quantise", self.state(), state)
        self._steps = int(state.counters["steps"] or 0)
