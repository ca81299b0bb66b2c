"""Error feedback: what was not sent waits in a residual and is offered again.

Of one piece of the gradient, per step, with g the fresh gradient sum (already divided by the global
batch), M the number of parties that compress, and c <= 1 the clipping factor:

    g   <- c g + weight_decay / M * w
    u   <- momentum * u + g;   d = g + momentum * u if nesterov else u;   d = g without momentum
    acc <- residual + lr * d
    sent is picked from acc, and the sum of all parties' sent is subtracted from w
    residual <- acc - sent;   with `masking`, u <- 0 where something was sent

Residual and velocity keep their values until `commit`, so that a step in which any party saw inf or
NaN leaves no trace. Without momentum acc is made in a second vector, which then becomes the
residual; with momentum there are two velocities instead, and acc is made in the memory of g and
copied. That makes 2 or 3 vectors.

The residual is in units of the update, since lr multiplies the fresh gradient before it is added:
Alistarh et al. 2018 (arXiv 1809.10505, Algorithm 1), with the sum over parties in place of the mean
(the division by the number of samples comes before). A residual is therefore never rescaled, and
the sum of all residuals is conserved whatever the number of parties. Momentum before selection and
the masking of u are those of Deep Gradient Compression (Lin et al. 2018, arXiv 1712.01887, sections
3.1 and 3.3), as is clipping each party's gradient to clip_norm / sqrt(M) (section 3.2). Three
differences: the velocity is not accumulated without lr; c comes from the norm of the step before,
since the exchange starts while backward has not finished the norm; and masking is a choice. Without
it, w less all residuals moves exactly as under momentum SGD; with it an entry that is sent at every
step has no momentum at all, while one that is summed whole (`total`) keeps all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hpctrain.compress.select import BLOCK, Picked, Selector


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
    masking: bool = False
    """Set the velocity to zero where something is sent; needs momentum."""


class Feedback:
    """The residual and velocity of one piece of the gradient. All methods are local.

    Args:
        rule: The update rule.
        grad_N: float32; this rank's fresh gradient, overwritten.
        neighbours: The same piece of the gradients of the node's other ranks, to be added.
        params_N: The parameters, for weight decay.
        all_N: Where acc is to be made if all of it is sent at every step: there is no residual, but
            one that `load` brings is sent with the first step.
        block: Entries per block of `prepare`.
    """

    def __init__(
        self,
        rule: LocalRule,
        grad_N: np.ndarray,
        neighbours: Sequence[np.ndarray],
        params_N: np.ndarray,
        all_N: np.ndarray | None = None,
        *,
        block: int = BLOCK,
    ) -> None:
        self.n = len(grad_N)
        waits = all_N is None
        self.residual_N = np.zeros(self.n if waits else 0, np.float32)
        self.velocity_N = np.zeros(self.n if rule.momentum else 0, np.float32)
        """As last committed; empty without momentum."""
        self.residual_sq = 0.0
        """Sum of squares of the residual as last committed; NaN after a step without `watch`."""
        self.grad_sq = 0.0
        """Sum of squares of the fresh gradient, where the rule clips."""
        self._rule, self._waits, self._block = rule, waits, block
        self._grad_N, self._neighbours, self._params_N = grad_N, neighbours, params_N
        self._next_velocity_N = np.zeros_like(self.velocity_N)
        self._in_place = waits and bool(rule.momentum)
        if all_N is not None:
            self.acc_N = all_N
        elif self._in_place:
            self.acc_N = grad_N
        else:
            self.acc_N = np.zeros(self.n, np.float32)
        self._lr, self._clip, self._watch = 0.0, 1.0, True
        self._acc_sq = 0.0
        self._prepared, self._finite = False, True
        self._grads = self._blocks_of(self._grad_N)
        self._accs = self._blocks_of(self.acc_N)
        self._residuals = self._blocks_of(self.residual_N)
        self._velocities = self._blocks_of(self.velocity_N)
        self._next_velocities = self._blocks_of(self._next_velocity_N)
        self._params = self._blocks_of(params_N)
        parts = [self._blocks_of(neighbour) for neighbour in neighbours]
        self._neighbour_blocks = [
            [part[number] for part in parts] for number in range(len(self._grads))
        ]

    def begin(self, lr: float, clip: float = 1.0, *, watch: bool = True) -> None:
        """A step starts.

        Args:
            lr: Its step size.
            clip: The factor that clips the fresh gradient.
            watch: Whether `residual_sq` is wanted, which costs a fifth of `pick`.
        """
        self._lr, self._clip, self._watch = lr, clip, watch
        self._prepared = False
        self._acc_sq = self.grad_sq = 0.0
        self._finite = True

    @np.errstate(all="ignore")
    def sample(self, where: slice) -> np.ndarray:
        """acc[where] as `prepare` will make it. Changes nothing."""
        if self._prepared:
            return self.acc_N[where]
        rule = self._rule
        grad: np.ndarray = self._grad_N[where].copy()
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
        if self._keeps:
            grad += self.residual_N[where]
        return grad

    def prepare(self, start: int, stop: int) -> None:
        """Make acc[start:stop], a whole block, out of the fresh gradient there, once per step."""
        if self._prepared:
            return
        rule, number = self._rule, start // self._block
        grad, acc, params = self._grads[number], self._accs[number], self._params[number]
        for neighbour in self._neighbour_blocks[number]:
            grad.add_(neighbour)
        if rule.clips:
            self.grad_sq += float(torch.dot(grad, grad))
        if self._clip != 1.0:
            grad.mul_(self._clip)
        if rule.weight_decay:
            grad.add_(params, alpha=rule.weight_decay)
        direction = grad
        if rule.momentum:
            after = self._next_velocities[number]
            torch.add(grad, self._velocities[number], alpha=rule.momentum, out=after)
            direction = grad.add_(after, alpha=rule.momentum) if rule.nesterov else after
        if self._keeps:
            torch.add(self._residuals[number], direction, alpha=self._lr, out=acc)
        else:
            torch.mul(direction, self._lr, out=acc)
        if self._watch:
            squares = float(torch.dot(acc, acc))
            self._acc_sq += squares
            if not math.isfinite(squares):
                self._finite = self._finite and bool(torch.isfinite(acc).all())

    def prepare_all(self) -> bool:
        """`prepare` every block. Whether acc is finite."""
        self._watch = True
        for start in range(0, self.n, self._block):
            self.prepare(start, min(start + self._block, self.n))
        self._prepared = True
        return self._finite

    def pick(self, selector: Selector, k: int, start: int = 0, stop: int | None = None) -> Picked:
        """The k entries of acc[start:stop] of largest magnitude; all of acc unless it is prepared.

        Returns:
            Positions count from `start`.
        """
        if self._prepared:
            return selector.pick(self.acc_N[start:stop], k)
        assert (start, stop) == (0, None), "prepare_all() comes before a part is picked"
        return selector.pick(self.acc_N, k, sample=self.sample, prepare=self.prepare)

    def values(self, indices_K: np.ndarray) -> np.ndarray:
        """What acc holds at these positions."""
        found: np.ndarray = self.acc_N[indices_K]
        return found

    def total(self) -> np.ndarray:
        """All of acc, prepared, to be summed over parties in place."""
        return self.acc_N

    def take(self, indices_K: np.ndarray, sent_K: np.ndarray) -> None:
        """`sent_K` goes out at `indices_K` (no index twice): what is left there stays in acc."""
        before = self.acc_N[indices_K]
        after = before - sent_K
        self.acc_N[indices_K] = after
        if self._watch:
            self._acc_sq += float(np.dot(after, after)) - float(np.dot(before, before))
        if self._rule.masking:
            self._next_velocity_N[indices_K] = 0.0

    def publish(self) -> None:
        """Put acc where the node's other ranks read it: into `all_N`, or else the gradient."""
        if self._waits and not self._in_place:
            self._grad_N[:] = self.acc_N

    def commit(self, *, sent_all: bool = False) -> None:
        """The step counts: acc becomes the residual, zero where all was sent."""
        if not self._waits:
            self.residual_N, self._residuals = self.residual_N[:0], ()
        elif sent_all or not self._rule.feedback:
            self.residual_N[:] = 0.0
            self.residual_sq = 0.0
        else:
            self.residual_sq = max(self._acc_sq, 0.0) if self._watch else math.nan
            if self._in_place:
                self.residual_N[:] = self.acc_N
            else:
                self.residual_N, self.acc_N = self.acc_N, self.residual_N
                self._residuals, self._accs = self._accs, self._residuals
        if self._rule.momentum:
            self.velocity_N, self._next_velocity_N = self._next_velocity_N, self.velocity_N
            self._velocities, self._next_velocities = self._next_velocities, self._velocities

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual (N,) and velocity (N,), empty without momentum; they may alias live memory."""
        residual_N = self.residual_N if len(self.residual_N) else np.zeros(self.n, np.float32)
        return torch.from_numpy(residual_N), torch.from_numpy(self.velocity_N)

    def load(self, residual_N: torch.Tensor, velocity_N: torch.Tensor | None) -> None:
        """Take stored values."""
        if not self._waits:
            self.residual_N = np.zeros(self.n if residual_N.any() else 0, np.float32)
            self._residuals = self._blocks_of(self.residual_N)
        self.residual_N[:] = residual_N[: len(self.residual_N)]
        self.residual_sq = sum(float(torch.dot(part, part)) for part in self._residuals)
        if velocity_N is not None:
            self.velocity_N[:] = velocity_N

    @property
    def _keeps(self) -> bool:
        return self._rule.feedback and len(self.residual_N) > 0

    def _blocks_of(self, vector: np.ndarray) -> Sequence[torch.Tensor]:
        return torch.from_numpy(vector).split(self._block) if len(vector) else ()
