"""A run's regularisers as one, and the three moments of a step at which each may act.

    perturb           the parameters move before this rank's gradient is taken
    restore           and back, once it is taken
    adjust_gradient   something is added to the sum over ranks of the data's gradient

The sum is what an exchange leaves on every rank of a replica. What is added there each of these
ranks computes for itself, from parameters, seed and step, which are equal on them: it costs no
message, counts once however many ranks and micro-batches there are, and keeps the ranks bitwise
equal. The gradient's noise and diversity are measured on the way into the exchange, so they are
those of the data alone. Weight decay and clipping are the optimiser's and come afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpctrain.state import State


class Regulariser:
    """Does nothing at any moment; a kind overrides those at which it acts. Local throughout."""

    def perturb(self, step: int, gradient: Callable[[], None]) -> None:
        """Move the parameters.

        Args:
            step: Of this rank, from 0.
            gradient: Adds this rank's gradient to the flat gradient.
        """

    def restore(self) -> None:
        """Move the parameters back to where `perturb` found them."""

    def adjust_gradient(self, step: int, samples: int) -> None:
        """Add to the flat gradient, in place.

        Args:
            step: Of this rank, from 0; equal on the ranks of a replica.
            samples: Over which the flat gradient is a mean.
        """

    def tally(self) -> dict[str, float]:
        """Numbers of the last step, for metrics.jsonl, equal on the ranks of a replica."""
        return {}

    def state(self) -> State:
        """What a resumed run needs; tensors alias live memory."""
        return State()

    def load_state(self, state: State) -> None:
        """Take a state back."""


class Regularisers:
    """All regularisers of a run, in the order of the configuration; may be none. Local throughout.

    Args:
        running: Kind and regulariser; no kind twice.
    """

    def __init__(self, running: Sequence[tuple[str, Regulariser]]) -> None:
        self._running = dict(running)

    def perturb(self, step: int, gradient: Callable[[], None]) -> None:
        """Move the parameters; see `Regulariser`."""
        for regulariser in self._running.values():
            regulariser.perturb(step, gradient)

    def restore(self) -> None:
        """Move the parameters back, the last mover first."""
        for regulariser in reversed(self._running.values()):
            regulariser.restore()

    def adjust_gradient(self, step: int, samples: int) -> None:
        """Add to the flat gradient; see `Regulariser`."""
        for regulariser in self._running.values():
            regulariser.adjust_gradient(step, samples)

    def tally(self) -> dict[str, float]:
        """KIND.NAME -> number."""
        return {
            f"{kind}.{name}": value
            for kind, regulariser in self._running.items()
            for name, value in regulariser.tally().items()
        }

    def state(self) -> State:
        """KIND.NAME -> tensor or counter."""
        whole = State()
        for kind, regulariser in self._running.items():
            part = regulariser.state()
            whole.tensors |= {f"{kind}.{name}": placed for name, placed in part.tensors.items()}
            whole.counters |= {f"{kind}.{name}": count for name, count in part.counters.items()}
        return whole

    def load_state(self, state: State) -> None:
        """Take a state back.

        Raises:
            ConfigError: it is of other regularisers or another model.
        """
        for kind, regulariser in self._running.items():
            prefix = f"{kind}."
            tensors = {
                name.removeprefix(prefix): placed
                for name, placed in state.tensors.items()
                if name.startswith(prefix)
            }
            counters = {
                name.removeprefix(prefix): count
                for name, count in state.counters.items()
                if name.startswith(prefix)
            }
            regulariser.load_state(State(tensors, counters))
