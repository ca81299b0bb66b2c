"""Local SGD: replicas train on their own and are replaced by their average now and then.

    every `every` steps:  mean = sum of w_i x_i;  centre = outer(x_start, mean)
                          x_i <- x_i + pull * (centre - x_i)

    w_i = 1 / M (weights = "equal") or in proportion to 1 / |g_i| ("inverse_gradient_norm")

pull = 1 replaces. With a schedule for `every` this is post-local SGD; with [sync.outer] SlowMo or
DiLoCo; with inverse_gradient_norm and a pull below 1 GRAWA. Per meeting and rank: one all-reduce of
what travels; memory: none, with an outer optimiser two more vectors of the parameters' length. With
one replica an outer optimiser still acts, on what that replica does in a round.

`adapt = "diversity"` follows the gradient diversity between replicas, measured by their movement
delta_i since the last meeting:

    D = mean of |delta_i|^2 / |mean of delta_i|^2      (1 if all moved alike, M if at right angles)
    steps to the next meeting = every * (D_1 / D) * (lr_1 / lr), rounded, between 1 and 4 * every

where D_1 and lr_1 are those of the first meeting.

Source: Stich 2018, arXiv 1805.09767 (local SGD); Lin et al. 2018, arXiv 1808.07217 (post-local);
Haddadpour, Mahdavi 2019, arXiv 1910.14425: the bound on (period x step size) falls with the
weighted gradient diversity, Assumption of bounded diversity; the proportional rule is ours, theirs
states an order. Dimlioglu, Choromanska 2024 (GRAWA; AISTATS): w_i from the gradient norm, smoothed
over meetings with factor 0.43; here of the step's own gradient, there of a fresh sub-batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hpctrain.errors import ConfigError, NonFinite
from hpctrain.state import Counter, Placed, State
from hpctrain.sync.outer import OuterConfig
from hpctrain.sync.rule import Ground, Moment, PeriodicRule
from hpctrain.sync.table import RuleTable

_GRADIENT_NORM_DECAY = 0.9**8
_LONGEST = 4


class Average(RuleTable):
    """[[sync]] kind = "average"."""

    kind: Literal["average"] = "average"
    """The average of the replicas."""
    pull: float = Field(default=1.0, gt=0.0, le=1.0)
    """How far each replica moves to the average; 1 replaces it."""
    weights: Literal["equal", "inverse_gradient_norm"] = "equal"
    """What each replica counts in the average."""
    outer: OuterConfig | None = None
    """An optimiser that takes the average as a gradient: SlowMo, or Nesterov for DiLoCo."""
    adapt: Literal["off", "diversity"] = "off"
    """Let the period follow the measured gradient diversity between replicas."""

    @model_validator(mode="after")
    def _combinations(self) -> Average:
        if self.outer is not None and self.pull != 1.0:
            raise ValueError("[sync.outer] restarts all replicas at one point; drop pull")
        if self.outer is not None and self.weights != "equal":
            raise ValueError('[sync.outer] takes weights = "equal"')
        return self

    def build(self, ground: Ground) -> AverageRule:
        """Collective. The running rule."""
        return AverageRule(self, ground)


class AverageRule(PeriodicRule):
    """Runs `Average`."""

    def __init__(self, config: Average, ground: Ground) -> None:
        super().__init__(config, self._follow_schedule)
        self._config = config
        self._ground = ground
        self._factor = 1.0
        self._first: tuple[float, float] | None = None
        self._norm = torch.zeros(1, dtype=torch.float64)
        """Of this replica's gradient, smoothed over meetings; 0 before the first."""
        params_P = ground.payload.pack()[: ground.payload.n_params]
        self._start_P = params_P.clone() if config.outer or config.adapt == "diversity" else None
        self._slow_P = torch.zeros_like(params_P) if config.outer else None

    def meet(self, at: Moment, vector_N: Tensor) -> None:
        """As `Rule.meet`. Tells the consensus distance, sqrt(mean of |x_i - mean|^2)."""
        n_params, members = self._ground.payload.n_params, self._ground.members
        mean_N = vector_N.clone()
        weight = self._weigh()
        if weight != 1.0:
            mean_N *= weight
        members.mean(mean_N.numpy())
        own_P, mean_P = vector_N[:n_params], mean_N[:n_params]
        said = [float(torch.dist(own_P, mean_P) ** 2)]
        if self._start_P is not None:
            said += [float(torch.dist(own_P, self._start_P) ** 2)]
        squares = members.gather(said).mean(0).tolist()
        tally = {"consensus_distance": math.sqrt(squares[0])}
        if not math.isfinite(squares[0]):
            raise NonFinite("the parameters of a replica are inf or NaN")
        if self._start_P is not None:
            moved = float(torch.dist(mean_P, self._start_P) ** 2)
            tally["replica_diversity"] = squares[1] / moved if moved else 1.0
            self._follow_diversity(tally["replica_diversity"], at.lr)
            if self._config.outer is not None:
                assert self._slow_P is not None
                self._config.outer.step(self._start_P, mean_P, self._slow_P, at.lr)
            else:
                self._start_P.copy_(mean_P)
        if self._config.pull == 1.0:
            vector_N.copy_(mean_N)
        else:
            vector_N.lerp_(mean_N, self._config.pull)
        self.held(at, tally)

    def state(self) -> State:
        """The round's start and the outer memory, equal on all members; counters. Local."""
        tensors = {}
        if self._start_P is not None:
            tensors["start"] = Placed(self._start_P)
        if self._config.weights == "inverse_gradient_norm":
            tensors["gradient_norm"] = Placed(self._norm)
        if self._slow_P is not None:
            tensors["slow"] = Placed(self._slow_P)
        counters: dict[str, Counter] = {
            **self._trigger.counters(),
            "factor": self._factor,
        }
        if self._first is not None:
            counters |= {"first_diversity": self._first[0], "first_lr": self._first[1]}
        return State(tensors, counters)

    def load_state(self, state: State) -> None:
        """Local.

        Raises:
            ConfigError: the state is of other settings.
        """
        own = self.state().tensors
        if own.keys() != state.tensors.keys():
            raise ConfigError(
                f"the checkpoint's [[sync]] rule remembers {sorted(state.tensors) or 'nothing'}, "
                f"this one {sorted(own) or 'nothing'}. Resume with the [[sync]] tables the run was "
                "started with"
            )
        for name, placed in own.items():
            placed.tensor.copy_(state.tensors[name].tensor)
        counters = state.counters
        self._trigger.load_counters(counters)
        self._factor = float(counters["factor"] or 1.0)
        if "first_lr" in counters:
            self._first = (
                float(counters["first_diversity"] or 1.0),
                float(counters["first_lr"] or 1.0),
            )

    def _follow_schedule(self, epoch: float) -> int:
        return max(1, round(self._config.period(epoch) * self._factor))

    def _follow_diversity(self, diversity: float, lr: float) -> None:
        """Learn the length of the next round from this one's diversity."""
        if self._config.adapt == "diversity":
            self._first = self._first or (diversity, lr)
            first_diversity, first_lr = self._first
            wanted = first_diversity / diversity * first_lr / lr
            self._factor = min(max(wanted, 0.0), _LONGEST)

    def _weigh(self) -> float:
        """Collective. This replica's weight, times the number of replicas."""
        if self._config.weights == "equal":
            return 1.0
        norm = self._ground.gradient_norm()
        share = 1.0 - _GRADIENT_NORM_DECAY if float(self._norm) else 1.0
        self._norm += share * (norm - self._norm)
        norms_M = self._ground.members.gather(self._norm.tolist())[:, 0]
        inverse_M = 1.0 / norms_M.clip(min=1e-12)
        return float(inverse_M[self._ground.members.rank] / inverse_M.mean())
