"""The random generators that models and user data may draw from, as checkpoint state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from hpctrain.state import Placed, State


class RandomState:
    """Generators of Python, NumPy and torch on this rank: dropout, and whatever user code draws.

    Sample order and augmentation do not depend on them: they follow from (seed, epoch, sample).
    Placement per rank; at another number of ranks they start afresh from (seed, rank, samples).
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._seed, self._rank = seed, rank

    def seed_model(self) -> None:
        """Equal seeds on all ranks, for equal initial parameters. Local."""
        self._seed_all(self._seed)

    def seed_rank(self, samples: int) -> None:
        """Different seeds on each rank, for independent dropout masks. Local."""
        sequence = np.random.SeedSequence((self._seed, self._rank, samples))
        self._seed_all(int(sequence.generate_state(1)[0]))

    def state(self) -> State:
        """Local. All generators as integer tensors."""
        version, words, gauss = random.getstate()
        assert version == 3
        legacy: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - user code draws here
        tensors = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(words, dtype=torch.int64),
            "python_gauss": torch.tensor(
                [0.0 if gauss is None else 1.0, gauss or 0.0], dtype=torch.float64
            ),
            "numpy": torch.from_numpy(np.asarray(legacy[1]).astype(np.int64)),
            "numpy_rest": torch.tensor([legacy[2], legacy[3], legacy[4]], dtype=torch.float64),
        }
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        placed = {name: Placed(t, "per_rank", "reset") for name, t in tensors.items()}
        return State(tensors=placed)

    def load_state(self, state: State) -> None:
        """Local. Leaves the present seeds where the state was reset by another number of ranks."""
        tensors = {name: placed.tensor for name, placed in state.tensors.items()}
        if "torch" not in tensors:
            return
        torch.set_rng_state(tensors["torch"])
        has_gauss, gauss = tensors["python_gauss"].tolist()
        words = tuple(int(word) for word in tensors["python"].tolist())
        random.setstate((3, words, gauss if has_gauss else None))
        position, has_gauss, gauss = tensors["numpy_rest"].tolist()
        keys = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))  # noqa: NPY002 - user code draws here
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])

    @staticmethod
    def _seed_all(seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - user code draws here
