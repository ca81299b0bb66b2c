"""Models that misbehave on purpose, for fault tests: `model.kind = "misbehaving:name"`."""

from __future__ import annotations

import os
import random
import time

import torch
from torch import Tensor, nn

from hpctrain.data.spec import Spec


def launcher_rank() -> int:
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


class Misbehaving(nn.Module):
    """A two-layer network that calls `trouble(step)` in every training pass."""

    def __init__(
        self, spec: Spec, sleep_s: float = 0.0, jitter_s: float = 0.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        size = 1
        for length in spec.input_shape:
            size *= length
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(size, 32),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, spec.n_outputs),
        )
        self._sleep_s, self._jitter_s = sleep_s, jitter_s
        self._delays = random.Random(os.getpid())
        self.steps = 0
        if jitter_s:
            for parameter in self.body.parameters():
                parameter.register_post_accumulate_grad_hook(self._delay)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            time.sleep(self._sleep_s)
            return self.trouble(self.body(inputs))
        outputs: Tensor = self.body(inputs)
        return outputs

    def trouble(self, outputs: Tensor) -> Tensor:
        return outputs

    def _delay(self, parameter: Tensor) -> None:
        time.sleep(self._delays.random() * self._jitter_s)


class Raises(Misbehaving):
    def trouble(self, outputs: Tensor) -> Tensor:
        if self.steps == 5 and launcher_rank() == 1:
            raise RuntimeError("planted: the fifth step of rank 1")
        return outputs


class Exits(Misbehaving):
    def trouble(self, outputs: Tensor) -> Tensor:
        if self.steps == 5 and launcher_rank() == 1:
            raise SystemExit(3)
        return outputs


class NotANumber(Misbehaving):
    def trouble(self, outputs: Tensor) -> Tensor:
        if self.steps == 5 and launcher_rank() == 1:
            return outputs * torch.nan
        return outputs


class Hangs(Misbehaving):
    def trouble(self, outputs: Tensor) -> Tensor:
        if self.steps == 5 and launcher_rank() == 1:
            time.sleep(3600)
        return outputs


def calm(spec: Spec, **settings: float) -> nn.Module:
    return Misbehaving(spec, **settings)


def regular(spec: Spec) -> nn.Module:
    """Slow, and without dropout: its losses do not depend on the number of ranks."""
    return Misbehaving(spec, sleep_s=0.03, dropout=0.0)


def raises(spec: Spec) -> nn.Module:
    return Raises(spec)


def exits(spec: Spec) -> nn.Module:
    return Exits(spec)


def not_a_number(spec: Spec) -> nn.Module:
    return NotANumber(spec)


def hangs(spec: Spec) -> nn.Module:
    return Hangs(spec)
