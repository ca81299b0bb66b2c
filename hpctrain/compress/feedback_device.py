"""Error feedback of a gradient on a GPU: `feedback`'s rule, with only picked entries on the host.

Everything runs on the device's current stream, behind the backward pass that made the gradient.
Each rank compresses for itself: there are no neighbours to add. `select_device` picks, so the count
of a step is an upper bound. Checked on the host only, where tensors take the same way.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hpctrain.compress.feedback import Feedback, LocalRule
from hpctrain.compress.select import Picked, Selector
from hpctrain.compress.select_device import pick_on_device


class DeviceFeedback:
    """As `feedback.Feedback`, of tensors. All methods are local.

    Args:
        rule: The update rule.
        grad_N: This rank's fresh gradient, overwritten.
        params_N: The parameters, for weight decay.
        sum_N: Host memory (N,) float32 for the sum of acc over parties.
        waits: Whether entries may have to wait; False: all are sent at every step.
    """

    def __init__(
        self, rule: LocalRule, grad_N: Tensor, params_N: Tensor, sum_N: np.ndarray, *, waits: bool
    ) -> None:
        self.n = len(grad_N)
        self.residual_N = torch.zeros_like(grad_N if waits else grad_N[:0])
        self.velocity_N = torch.zeros_like(grad_N if rule.momentum else grad_N[:0])
        self.residual_sq = self.grad_sq = 0.0
        self._rule, self._grad_N, self._params_N = rule, grad_N, params_N
        self._sum_N, self._waits = sum_N, waits
        self._next_velocity_N = torch.zeros_like(self.velocity_N)
        self._acc_N = torch.zeros_like(grad_N)
        self._lr, self._clip, self._watch, self._calls = 0.0, 1.0, True, 0
        self._prepared = False

    def begin(self, lr: float, clip: float = 1.0, *, watch: bool = True) -> None:
        """As `Feedback.begin`."""
        self._lr, self._clip, self._watch = lr, clip, watch
        self._prepared = False

    def prepare_all(self) -> bool:
        """Make acc. Whether it is finite, which waits for the device."""
        self._prepare()
        return bool(torch.isfinite(self._acc_N.sum()))

    def sample(self, where: slice) -> np.ndarray:
        """acc[where] on the host."""
        self._prepare()
        found: np.ndarray = self._acc_N[where].cpu().numpy()
        return found

    def pick(self, selector: Selector, k: int, start: int = 0, stop: int | None = None) -> Picked:
        """As `Feedback.pick`, of about k entries, on the host."""
        self._prepare()
        found = pick_on_device(self._acc_N[start:stop], k, self._calls)
        self._calls += 1
        indices, values = found.indices_K.cpu().numpy(), found.values_K.cpu().numpy()
        real = values != 0.0
        return Picked(indices[real].astype(np.uint32), values[real], bool(found.finite))

    def values(self, indices_K: np.ndarray) -> np.ndarray:
        """What acc holds at these positions, on the host."""
        found: np.ndarray = self._acc_N[self._there(indices_K)].cpu().numpy()
        return found

    def take(self, indices_K: np.ndarray, sent_K: np.ndarray) -> None:
        """As `Feedback.take`."""
        where = self._there(indices_K)
        self._acc_N.index_add_(0, where, torch.from_numpy(-sent_K).to(self._acc_N.device))
        if self._rule.masking:
            self._next_velocity_N[where] = 0.0

    def total(self) -> np.ndarray:
        """All of acc on the host, to be summed over parties."""
        self._prepare()
        self._sum_N[:] = self._acc_N.cpu().numpy()
        return self._sum_N

    def publish(self) -> None:
        """Nothing: `total` lies where the sum is read."""

    def commit(self, *, sent_all: bool = False) -> None:
        """As `Feedback.commit`."""
        if not self._waits:
            self.residual_N = self.residual_N[:0]
        elif sent_all or not self._rule.feedback:
            self.residual_N.zero_()
            self.residual_sq = 0.0
        else:
            self.residual_N, self._acc_N = self._acc_N, self.residual_N
            squares = float(self.residual_N.square().sum()) if self._watch else math.nan
            self.residual_sq = squares
        if self._rule.momentum:
            self.velocity_N, self._next_velocity_N = self._next_velocity_N, self.velocity_N

    def stored(self) -> tuple[Tensor, Tensor]:
        """As `Feedback.stored`."""
        residual_N = self.residual_N if len(self.residual_N) else torch.zeros_like(self._grad_N)
        return residual_N, self.velocity_N

    def load(self, residual_N: Tensor, velocity_N: Tensor | None) -> None:
        """Take stored values."""
        if not self._waits and residual_N.any():
            self.residual_N = torch.zeros_like(self._grad_N)
        self.residual_N.copy_(residual_N[: len(self.residual_N)])
        self.residual_sq = float(self.residual_N.square().sum())
        if velocity_N is not None:
            self.velocity_N.copy_(velocity_N)

    def _prepare(self) -> None:
        if self._prepared:
            return
        self._prepared = True
        rule, grad = self._rule, self._grad_N
        if rule.clips:
            self.grad_sq = float(grad.square().sum())
        if self._clip != 1.0:
            grad.mul_(self._clip)
        if rule.weight_decay:
            grad.add_(self._params_N, alpha=rule.weight_decay)
        direction = grad
        if rule.momentum:
            after = self._next_velocity_N
            torch.add(grad, self.velocity_N, alpha=rule.momentum, out=after)
            direction = grad.add_(after, alpha=rule.momentum) if rule.nesterov else after
        if rule.feedback and len(self.residual_N):
            torch.add(self.residual_N, direction, alpha=self._lr, out=self._acc_N)
        else:
            torch.mul(direction, self._lr, out=self._acc_N)

    def _there(self, indices_K: np.ndarray) -> Tensor:
        return torch.from_numpy(indices_K.astype(np.int64)).to(self._acc_N.device)


AnyFeedback = Feedback | DeviceFeedback
"""Error feedback, wherever the gradient lies."""
