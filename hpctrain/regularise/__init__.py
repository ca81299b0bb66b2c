"""What is added to loss, gradient or update: the tables `[[regulariser]]`, one file per `kind`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from hpctrain.regularise.noise import Noise
from hpctrain.regularise.sam import Sam
from hpctrain.regularise.spectral import Spectral
from hpctrain.regularise.wasserstein import Wasserstein

RegulariserConfig = Annotated[Sam | Spectral | Wasserstein | Noise, Field(discriminator="kind")]
"""The choices of `regulariser.kind`. A new regulariser is one more member of this union."""


def require_fit(regularisers: Sequence[RegulariserConfig], gives: str) -> None:
    """Check the tables against each other and the exchange's `gives`. Local, pure.

    Raises:
        ValueError: with what is allowed.
    """
    for kind, times in Counter(table.kind for table in regularisers).items():
        if times > 1:
            raise ValueError(f'[[regulariser]] kind = "{kind}" stands {times} times; give it once')
    for table in regularisers:
        if table.adjusts_gradient and gives == "update":
            raise ValueError(
                f'[[regulariser]] kind = "{table.kind}" adds to the summed gradient before the '
                'optimiser\'s step, and an exchange with gives = "update" has made its update by '
                'then: set exchange.gives = "gradient", or exchange.kind = "dense"'
            )
