"""PowerSGD: every weight matrix crosses the network as two thin factors.

Per step and matrix, with G_r the (rows, columns) gradient of rank r, already divided by the global
batch; every parameter of two or more dimensions is a matrix of shape[0] rows:

    A_r <- G_r + E_r                           E_r: this rank's residual
    P   <- sum over ranks of A_r orth(Q)       (rows, k): first all-reduce
    P   <- orth(P);  Q_r <- A_r^T P            (columns, k)
    Q   <- sum over ranks of Q_r               second all-reduce
    E_r <- A_r - P Q_r^T;   G <- P Q^T         the gradient given, equal on all ranks

k = min(`matrix_rank`, rows, columns). Q is where the next step's iteration starts (warm start).
Parameters of one dimension, and matrices with (rows + columns) k `min_compression_rate` >= rows
columns, stay dense and travel with the P factors in one buffer. The first `start_step` steps sum
the whole gradient; so does one rank alone, where nothing is lost.

Error feedback is on the sum over ranks, and every factor in it is 1: sum of E_r + gradient given =
sum of G_r + sum of the E_r before. Residuals are in units of the gradient, as in the paper: the lr
of the step that sends them multiplies them.

Source: Vogels, Karimireddy, Jaggi 2019 (arXiv 1905.13727), Algorithms 1 and 2, with the choices of
PyTorch's DDP hook (powerSGD_hook.py): both factors orthogonalised, which matrices are worth it,
start after some dense steps. Differences: sums instead of means; the residual is A_r - P Q_r^T as
in the paper, not A_r minus the mean over ranks as in the hook (equal in sum, but the hook's grows
with the ranks' differences and loses bits); Householder QR instead of Gram-Schmidt; two all-reduces
instead of three; residuals and Q are checkpointed.

Cost per step: with F = 2 + dense entries + sum of rows k and H = sum of columns k, a rank sends
2(P-1)/P * 4 (F + H) bytes on a ring, and multiplies and adds 4 k times per compressed entry (6 with
the residual). Extra memory: the residual of every compressed entry, and F + 3 H. Everything is done
in `finish` and `settle`, nothing during backward. On a GPU the factors are computed there and
summed in host copies.

Limits: the model is float32. Ranks agree bitwise where their CPUs (or GPUs) and thread counts are
equal, since each computes orth and P Q^T for itself.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hpctrain.compress.lowrank import LowRank, factor_columns
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
from hpctrain.state import Placed, State
from hpctrain.transport.communicator import Communicator

_HEADER = 2
"""Of the first sum: how many ranks saw inf or NaN, and the squares of their residuals."""


class PowerSgd(ExchangeTable):
    """[exchange] kind = "powersgd": low-rank factors of every weight matrix."""

    gives: ClassVar[Literal["gradient"]] = "gradient"
    kind: Literal["powersgd"] = "powersgd"
    """Sum low-rank factors of the gradient's matrices, with error feedback and warm start."""
    matrix_rank: int = Field(default=2, ge=1)
    """Columns of the factors: more keep more of the gradient and send more."""
    start_step: int = Field(default=10, ge=0)
    """Steps that sum the whole gradient before compression begins."""
    min_compression_rate: float = Field(default=2.0, gt=0.0)
    """Matrices whose factors are not smaller by more than this factor stay dense."""

    def comes_last(self, shape: torch.Size) -> bool:
        """No parameter needs a special place. Local."""
        return False

    def require_fit(self, train: Train, optimiser: OptimiserConfig) -> None:
        """Local. ValueError where the tables [train] and [optimiser] do not fit this one."""
        require_float32(self.kind, train.dtype)

    def build(self, setting: Setting) -> PowerSgdExchange:
        """Collective. The running exchange; ConfigError where the model is not float32."""
        require_float32_model(self.kind, setting.flat)
        comm = setting.comm.split(0, setting.comm.rank)
        assert comm is not None
        return PowerSgdExchange(self, setting.flat, comm)


class PowerSgdExchange:
    """Runs PowerSGD for one float32 model, over a communicator of its own."""

    gives: Literal["gradient", "update"] = "gradient"
    ready = True

    def __init__(self, config: PowerSgd, flat: FlatModel, comm: Communicator) -> None:
        self.bucket_names = ["dense parameters and P factors", "Q factors"]
        self.current = -1
        self._flat, self._comm = flat, comm
        self._start_step, self._steps = config.start_step, 0
        most, rate = config.matrix_rank, config.min_compression_rate
        columns = [factor_columns(shape, most, rate) for shape in flat.shapes]
        pairs = list(zip(flat.views(flat.grads_P), columns, strict=True))
        grads = [grad.view(grad.shape[0], -1) for grad, k in pairs if k]
        kept = [k for k in columns if k]
        small = [where for where, k in zip(flat.slices, columns, strict=True) if not k]
        self._dense = Parts(small)
        n_p = sum(grad.shape[0] * k for grad, k in zip(grads, kept, strict=True))
        self._first = flat.grads_P.new_zeros(_HEADER + self._dense.n + n_p)
        self._dense_N, p_N = self._first[_HEADER:].split([self._dense.n, n_p])
        self._factors = LowRank(grads, kept, p_N)
        self._residual_norm = 0.0
        self.algorithm = (
            f"factors of rank {most} for {len(kept)} matrices, {self._dense.n:,} entries dense, "
            f"after {self._start_step} dense steps; {comm.algorithm}"
        )

    def arm(self, lr: float = 1.0) -> None:
        """Nothing happens during backward. Local."""

    def disarm(self) -> None:
        """Nothing happens during backward. Local."""

    def finish(self) -> bool:
        """Collective. Sum what the step sends; residuals and Q stay as they are until `settle`."""
        adopt_gradients(self._flat)
        grads_P, factors = self._flat.grads_P, self._factors
        squares = torch.dot(factors.residual_N, factors.residual_N)
        factors.begin()
        if self._whole:
            self._sum(0, grads_P)
            return all_finite(grads_P)
        self._dense.gather(grads_P, self._dense_N)
        factors.project()
        # Not left to the products: where Q is zero they may skip an inf.
        self._first[0], self._first[1] = float(not all_finite(grads_P)), squares
        self._sum(0, self._first)
        if not all_finite(self._first) or float(self._first[0]):
            return False
        self._residual_norm = math.sqrt(float(self._first[1]))
        factors.iterate()
        self._sum(1, factors.q_sum_N)
        return all_finite(factors.q_sum_N)

    def settle(self, *, keep: bool) -> None:
        """Local. Make the gradient, the residual and the next Q, or leave these two as they were.

        Without `keep` the flat gradient holds no gradient afterwards.
        """
        if not keep:
            return
        if self._whole:
            self._factors.residual_N.zero_()
        else:
            self._factors.commit()
            self._dense.scatter(self._dense_N, self._flat.grads_P)
        self._steps += 1

    def tally(self) -> dict[str, float]:
        """Local. Root of the sum over ranks of the squared residuals that the step began with."""
        return {"residual_norm": self._residual_norm}

    def close(self) -> None:
        """Nothing to end. Local."""

    def state(self) -> State:
        """Residuals per rank, conserved in sum when the ranks change in number; Q; steps."""
        residual = Placed(self._factors.residual_N, "per_rank", "sum")
        return State({"residual": residual, "q": Placed(self._factors.q_N)}, {"steps": self._steps})

    def load_state(self, state: State) -> None:
        """Local. Take a state back; ConfigError where it is of other settings or another model."""
        take_back("powersgd", self.state(), state)
        self._steps = int(state.counters["steps"] or 0)

    @property
    def _whole(self) -> bool:
        """Whether this step sums the whole gradient."""
        return self._steps < self._start_step or self._comm.size == 1

    def _sum(self, index: int, vector: Tensor) -> None:
        """Collective. In place, over all ranks."""
        self.current = index
        host = vector.cpu()
        self._comm.allreduce(host.numpy())
        if host is not vector:
            vector.copy_(host)
        self.current = -1
