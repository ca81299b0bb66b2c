"""One copy of a data set per node: the first rank of the node fills it, the others map it.

Two phases, so that no rank ever holds a private second copy: a survey says how large the arrays
are, then the memory is made, then it is filled in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpctrain import errors
from hpctrain.transport.communicator import Communicator, SharedWindow

_ALIGNMENT_BYTES = 64

Shapes = Mapping[str, tuple[tuple[int, ...], Any]]
"""Array name -> (shape, dtype)."""
Fill = Callable[[dict[str, np.ndarray]], dict[str, Any]]


@dataclass(frozen=True)
class Survey:
    """What is to be loaded."""

    arrays: Shapes
    fill: Fill
    """Writes every array in place and returns further facts, known only now."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Small values for all ranks; what JSON can hold."""


@dataclass(frozen=True)
class Shared:
    """What every rank of the node holds afterwards; the arrays are read-only."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    windows: list[SharedWindow]


def load_once(node: Communicator, survey: Callable[[], Survey]) -> Shared:
    """Collective over the node. Survey, allocate and fill on its rank 0; map on the others.

    A node of one rank uses ordinary memory. An error of rank 0 is raised on all ranks.

    Raises:
        DataError: as `survey` and its `fill`.
        BackendError: no room for the shared memory.
    """
    plans: list[Survey] = []

    def look() -> dict[str, Any]:
        plan = survey()
        plans.append(plan)
        shapes = {name: [list(s), np.dtype(d).str] for name, (s, d) in plan.arrays.items()}
        return {"arrays": shapes, "facts": plan.facts}

    seen = agree(node, look)
    layout, nbytes = _layout({name: (tuple(s), d) for name, (s, d) in seen["arrays"].items()})
    windows: list[SharedWindow] = []
    if node.size > 1 and nbytes:
        windows.append(node.window(nbytes if node.rank == 0 else 0))
        memory = windows[0].slices[0]
    else:
        memory = np.empty(nbytes, np.uint8)
    arrays = {
        name: memory[start : start + size].view(dtype).reshape(shape)
        for name, (start, size, shape, dtype) in layout.items()
    }
    try:
        later = agree(node, lambda: plans[0].fill(arrays))
    except Exception:  # all ranks come here, or none
        for window in windows:
            window.close()
        raise
    for window in windows:
        window.fence()
    for array in arrays.values():
        array.flags.writeable = False
    return Shared(arrays, {**seen["facts"], **later}, windows)


def agree(node: Communicator, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Collective over the node. The result of rank 0's `work()`, on every rank.

    Raises:
        HpctrainError: what `work` raised, on every rank, before any of them goes on to wait for
            another; for an exception of another kind, that one on rank 0 and its text elsewhere.
    """
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if node.rank == 0:
        try:
            outcome = {"result": work()}
        except Exception as error:  # noqa: BLE001 - the other ranks must hear of any failure
            failure = error
            outcome = {"error": type(error).__name__, "message": str(error)}
    payload = json.dumps(outcome).encode() if node.rank == 0 else None
    outcome = json.loads(node.broadcast_bytes(payload, 0))
    if failure is not None:
        raise failure
    if "error" in outcome:
        kind = getattr(errors, outcome["error"], None)
        if isinstance(kind, type) and issubclass(kind, errors.HpctrainError):
            raise kind(outcome["message"])
        raise errors.HpctrainError(
            f"the first rank of this node failed while it loaded the data: "
            f"{outcome['error']}: {outcome['message']}"
        )
    result: dict[str, Any] = outcome["result"]
    return result


def _layout(
    shapes: Shapes,
) -> tuple[dict[str, tuple[int, int, tuple[int, ...], np.dtype[Any]]], int]:
    """Array name -> (start byte, bytes, shape, dtype), and the bytes of all."""
    layout, end = {}, 0
    for name, (shape, given) in shapes.items():
        dtype = np.dtype(given)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        layout[name] = (end, size, shape, dtype)
        end += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return layout, end
