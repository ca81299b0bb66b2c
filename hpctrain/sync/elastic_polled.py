"""Elastic averaging in which nobody waits: the centre lies in pieces on the members.

    every `every` steps of its own a member asks for the centre; when it has come, some steps later:
        e = alpha * (x_i - c);   x_i <- x_i - e;   c <- c + e        (alpha = beta / M)

Each member goes at its own pace. c is put together of pieces that their owners may have changed
meanwhile; what one member takes the centre gains, so the sum of all x_i and c is conserved. Per
exchange a member sends and receives the vector once each.

Source: Zhang, Choromanska, LeCun 2015, arXiv 1412.6651, algorithm 1. Differences: the member trains
on while its question is answered; the centre has no server.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpctrain.sync.centre import CentredRule
from hpctrain.sync.rule import Ground


class PolledElasticRule(CentredRule):
    """Runs `Elastic` with `asynchronous = true`.

    Args:
        period: Epoch -> this member's steps between two questions.
        alpha: Stiffness of the spring.
        ground: What to work with.
    """

    def __init__(self, period: Callable[[float], int], alpha: float, ground: Ground) -> None:
        super().__init__(period, ground)
        self._alpha = alpha

    def follow(self, vector_N: Tensor) -> None:
        """As `CentredRule.follow`: what this member is pulled by, the centre gains."""
        pull_N = torch.sub(vector_N, self.centre.arrived_N).mul_(self._alpha)
        vector_N.sub_(pull_N)
        self.centre.add(pull_N)
