"""The shared window and the mailbox of ranks that are threads of one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.transport.verbs import as_bytes, check_buffer

if TYPE_CHECKING:
    from hpctrain.transport.thread_communicator import ThreadCommunicator


class ThreadWindow:
    """A `SharedWindow`: the ranks are threads, so ordinary memory is shared.

    Args:
        comm: Whose ranks share the memory.
        slices: One array per rank.
    """

    def __init__(self, comm: ThreadCommunicator, slices: list[np.ndarray]) -> None:
        self.slices: Sequence[np.ndarray] = slices
        self._comm = comm

    def fence(self) -> None:
        self._comm.meet("window fence", None, lambda brought: None)

    def close(self) -> None:
        self._comm.meet("window close", None, lambda brought: None)
        self.slices = []


class ThreadMailbox:
    """A `Mailbox` in which a message has arrived as soon as it is posted.

    Args:
        comm: Whose ranks post.
        boxes: One queue of (source, payload) per rank.
    """

    def __init__(
        self, comm: ThreadCommunicator, boxes: list[deque[tuple[int, np.ndarray]]]
    ) -> None:
        self._comm, self._boxes = comm, boxes

    def post(self, dest: int, payload: np.ndarray) -> None:
        self._comm.yield_turn(polls=True)
        check_buffer(payload)
        self._comm.count_post(dest, payload.nbytes)
        self._boxes[dest].append((self._comm.rank, as_bytes(payload).copy()))

    def poll(self) -> list[tuple[int, np.ndarray]]:
        self._comm.yield_turn(polls=True)
        return self._empty()

    def drain(self) -> list[tuple[int, np.ndarray]]:
        self._comm.meet("mailbox drain", None, lambda brought: None)
        return self._empty()

    def _empty(self) -> list[tuple[int, np.ndarray]]:
        box = self._boxes[self._comm.rank]
        arrived = list(box)
        box.clear()
        return arrived
