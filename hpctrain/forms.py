"""How the gradient noise of a run is measured.

It follows from the exchange and the replicas:

    groups   every rank's gradient is a group, its square rides on the step's control message and
             the exchange leaves the mean: no message, no pass
    pieces   a single rank: on every 8th step its micro-batches are groups, a lone one in halves
    sketch   no rank holds the mean gradient (sparse or lossy exchanges, several replicas): random
             sketches of all ranks' gradients are summed every 4 steps, of several replicas every 8.
             Each of these is at its own parameters, and their differences count as noise
"""

from __future__ import annotations

from typing import Literal

from hpctrain.errors import ConfigError

Form = Literal["off", "groups", "pieces", "sketch"]


def choose_form(
    measure: Literal["auto", "on", "off"],
    *,
    needed: bool,
    exact: bool,
    ranks: int,
    replicas: int,
    own_pace: bool,
) -> Form:
    """How a run is measured. Local, pure.

    Args:
        measure: `batch.measure`; auto measures what costs neither a message nor a pass.
        needed: Whether the policy or the step size needs it.
        exact: Whether the exchange leaves the mean gradient.
        ranks: How many.
        replicas: How many of those.
        own_pace: Whether replicas make unequal numbers of steps.

    Raises:
        ConfigError: it is needed and cannot be had.
    """
    wanted = needed or measure == "on"
    if measure == "off":
        return "off"
    if exact and replicas == 1 and ranks > 1:
        return "groups"
    if not wanted:
        return "off"
    if ranks == 1:
        return "pieces"
    if own_pace:
        raise ConfigError(
            "gradient noise compares the gradients that all ranks take at the same step, and with "
            "asynchronous [[sync]] rules ranks go at their own pace: set batch.measure = "
            '"off" with batch.kind = "fixed" or "adabatch", or let the rules meet (asynchronous = '
            "false)"
        )
    return "sketch"
