"""Messages between replicas of several ranks."""

from __future__ import annotations

import numpy as np

from hpctrain.transport.communicator import Communicator, Mailbox


class Relay:
    """A replica's mailbox: its first rank posts and polls, and all its ranks see what arrives.

    Args:
        box: On the replica's first rank; None on the others.
        inside: The ranks of the replica.
    """

    def __init__(self, box: Mailbox | None, inside: Communicator) -> None:
        self._box, self._inside = box, inside

    def post(self, dest: int, payload: np.ndarray) -> None:
        """As `Mailbox.post`, with equal payloads on the ranks of the replica."""
        if self._box is not None:
            self._box.post(dest, payload)

    def poll(self) -> list[tuple[int, np.ndarray]]:
        """Collective over the replica. As `Mailbox.poll`; waits for no other replica."""
        return self._share([] if self._box is None else self._box.poll())

    def drain(self) -> list[tuple[int, np.ndarray]]:
        """Collective over the group. As `Mailbox.drain`."""
        return self._share([] if self._box is None else self._box.drain())

    def _share(self, messages: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
        if self._inside.size == 1:
            return messages
        sizes = np.array([(source, payload.nbytes) for source, payload in messages], np.int64)
        told = sizes.tobytes() if self._inside.rank == 0 else None
        told = self._inside.broadcast_bytes(told, 0)
        if self._inside.rank > 0:
            rows = np.frombuffer(told, np.int64).reshape(-1, 2).tolist()
            messages = [(source, np.empty(nbytes, np.uint8)) for source, nbytes in rows]
        for _, payload in messages:
            self._inside.broadcast(payload, 0)
        return messages
