"""Error feedback: what was not sent waits in a residual and is offered again.

Of one piece of the gradient, per step, with g the fresh gradient sum (already divided by the global
batch), M the number of parties that compress, and c <= 1 the clipping factor:

    g   <- c g + weight_decay / M * w
    u   <- momentum * u + g;   d = g + momentum * u if nesterov else u;   d = g without momentum
    acc <- residual + lr * d
    sent is picked from acc, and the sum of all parties' sent is subtracted from w
    residual <- acc - sent;   u <- 0 where something was sent

`acc` is made in the memory of g, and residual and u keep their values until `commit`, so that a
step in which any party saw inf or NaN leaves no trace.

The residual is in units of the update, since lr multiplies the fresh gradient before it is added:
Alistarh et al. 2018 (arXiv 1809.10505, Algorithm 1), with the sum over parties in place of the mean
(the division by the number of samples comes before). A residual is therefore never rescaled, and
the sum of all residuals is conserved whatever the number of parties. Momentum before selection and
the masking of u are those of Deep Gradient Compression (Lin et al. 2018, arXiv 1712.01887, sections
3.1 and 3.3), as is clipping each party's gradient to clip_norm / sqrt(M) (section 3.2). Two
differences: the velocity is not accumulated without lr, and c comes from the norm of the step
before, since the exchange starts while backward has not finished the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hpctrain.compress.select import BLOCK


@dataclass(frozen=True)
class LocalRule:
    """The part of the update rule that comes before selection."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    """Already divided by the number of parties."""
    feedback: bool = True
    """Keep what is not sent; without it, it is lost."""
    clips: bool = False
    """Whether the norm of the fresh gradient is needed."""


class Feedback:
    """The residual and velocity of one piece of the gradient. All methods are local.

    Args:
        rule: The update rule.
        grad_N: float32; this rank's fresh gradient, overwritten by `acc`.
        neighbours: The same piece of the gradients of the node's other ranks, to be added.
        params_N: The parameters, for weight decay.
        block: Entries per block of `prepare`.
    """

    def __init__(
        self,
        rule: LocalRule,
        grad_N: np.ndarray,
        neighbours: Sequence[np.ndarray],
        params_N: np.ndarray,
        block: int = BLOCK,
    ) -> None:
        self.n = len(grad_N)
        self.acc_N = grad_N
        self.residual_N = np.zeros(self.n, np.float32)
        self.velocity_N = np.zeros(self.n if rule.momentum else 0, np.float32)
        """As last committed; empty without momentum."""
        self.norm_sq = 0.0
        """Of the fresh gradient of the last step."""
        self.residual_sq = 0.0
        """Of the residual as last committed."""
        self._rule = rule
        self._neighbours = neighbours
        self._next_velocity_N = np.zeros_like(self.velocity_N)
        self._params_N = params_N
        self._lr, self._clip = 0.0, 1.0
        self._prepared = False
        self._zeros = torch.zeros(min(block, self.n))
        self._block = block
        vectors = [
            *(grad_N, self.residual_N, params_N, self.velocity_N, self._next_velocity_N),
            *neighbours,
        ]
        self._blocks = [
            [torch.from_numpy(vector[start : start + block]) for vector in vectors]
            for start in range(0, self.n, block)
        ]

    def begin(self, lr: float, clip: float = 1.0) -> None:
        """A step starts: its step size, and the factor that clips the fresh gradient."""
        self._lr, self._clip = lr, clip
        self._prepared = False
        self.norm_sq = 0.0

    def sample(self, where: slice) -> np.ndarray:
        """acc[where] as `prepare` will make it. Changes nothing."""
        if self._prepared:
            return self.acc_N[where]
        rule = self._rule
        grad: np.ndarray = self.acc_N[where].copy()
        for neighbour in self._neighbours:
            grad += neighbour[where]
        if self._clip != 1.0:
            grad *= self._clip
        if rule.weight_decay:
            grad += rule.weight_decay * self._params_N[where]
        if rule.momentum:
            velocity = rule.momentum * self.velocity_N[where] + grad
            grad = grad + rule.momentum * velocity if rule.nesterov else velocity
        grad *= np.float32(self._lr)
        if rule.feedback:
            grad += self.residual_N[where]
        return grad

    def prepare(self, start: int, stop: int) -> None:
        """Make acc[start:stop], a whole block, out of the fresh gradient there, once per step."""
        if self._prepared:
            return
        rule = self._rule
        grad, residual, params, before, after, *neighbours = self._blocks[start // self._block]
        for neighbour in neighbours:
            grad.add_(neighbour)
        if rule.clips:
            self.norm_sq += float(torch.dot(grad, grad))
        if self._clip != 1.0:
            grad.mul_(self._clip)
        if rule.weight_decay:
            grad.add_(params, alpha=rule.weight_decay)
        direction = grad
        if rule.momentum:
            torch.add(grad, before, alpha=rule.momentum, out=after)
            direction = grad.add_(after, alpha=rule.momentum) if rule.nesterov else after
        if rule.feedback:
            torch.add(residual, direction, alpha=self._lr, out=grad)
        else:
            torch.mul(direction, self._lr, out=grad)

    def prepare_all(self) -> bool:
        """`prepare` every block. Whether all of acc is finite."""
        finite = True
        for start in range(0, self.n, self._block):
            self.prepare(start, min(start + self._block, self.n))
            acc = self._blocks[start // self._block][0]
            # 0 times inf or NaN is NaN, and nothing else is.
            finite = finite and float(torch.dot(acc, self._zeros[: len(acc)])) == 0.0
        self._prepared = True
        return finite

    def load(self, residual_N: np.ndarray, velocity_N: np.ndarray | None) -> None:
        """Take stored values."""
        self.residual_N[:] = residual_N
        self.residual_sq = sum(
            float(torch.dot(residual, residual)) for _, residual, *_ in self._blocks
        )
        if velocity_N is not None:
            self.velocity_N[:] = velocity_N

    def take(self, indices_K: np.ndarray, sent_K: np.ndarray) -> None:
        """`sent_K` goes out at `indices_K` (no index twice): what is left there stays in acc."""
        self.acc_N[indices_K] -= sent_K
        if self._rule.momentum:
            self._next_velocity_N[indices_K] = 0.0

    def commit(self, *, sent_all: bool = False) -> None:
        """The step counts: acc becomes the residual, zero where all was sent."""
        if sent_all:
            self.residual_N[:] = 0.0
            self.residual_sq = 0.0
        elif self._rule.feedback:
            self.residual_sq = 0.0
            for grad, residual, *_ in self._blocks:
                residual.copy_(grad)
                self.residual_sq += float(torch.dot(residual, residual))
        if self._rule.momentum:
            self.velocity_N, self._next_velocity_N = self._next_velocity_N, self.velocity_N
            for block in self._blocks:
                block[3], block[4] = block[4], block[3]
