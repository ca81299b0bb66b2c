"""What is added to loss, gradient or update: the tables `[[regulariser]]`, one file per `kind`."""

from __future__ import annotations

from hpctrain.regularise.sam import Sam

RegulariserConfig = Sam
"""The choices of `regulariser.kind`."""
