"""hpctrain: data-parallel training of PyTorch models, started by MPI.

`hpctrain.train(config)` runs what the command line runs; `hpctrain.attach(model, optimizer)` brings
the gradient exchange into a loop of your own. Importing this package loads neither torch nor MPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "attach", "train"]

if TYPE_CHECKING:
    from hpctrain.api import train
    from hpctrain.drop_in import attach


def __getattr__(name: str) -> Any:
    if name == "train":
        from hpctrain.api import train

        return train
    if name == "attach":
        from hpctrain.drop_in import attach

        return attach
    raise AttributeError(f"module 'hpctrain' has no attribute '{name}'")
