"""How far the nodes' clocks differ: logs, deadlines and file times come from them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hpctrain.doctor.finding import Finding, time_text
from hpctrain.transport.communicator import Communicator

_ROUNDS = 5
_TOO_FAR_S = 1.0


@dataclass(frozen=True)
class Clock:
    """One node's clock beside rank 0's."""

    host: str
    ahead_s: float
    within_s: float
    """The offset is known to this much: half of the quickest message's way and back."""


def measure(comm: Communicator) -> list[Clock]:
    """Collective. Every other node's clock, on rank 0; nothing elsewhere.

    Rank 0 and the first rank of each node send each other a few messages, one node at a time.
    """
    topology = comm.topology
    found = []
    for node in range(topology.n_nodes):
        head = topology.ranks_on(node)[0]
        if head == 0:
            continue
        if comm.rank == 0:
            found.append(_ask(comm, head))
        elif comm.rank == head:
            _answer(comm)
    comm.barrier()
    return found


def check(clocks: Sequence[Clock]) -> Iterator[Finding]:
    """Whether the clocks agree within a second."""
    if not clocks:
        return
    worst = max(clocks, key=lambda clock: abs(clock.ahead_s))
    word = "ahead of" if worst.ahead_s >= 0 else "behind"
    values = {clock.host: clock.ahead_s for clock in clocks}
    if abs(worst.ahead_s) > _TOO_FAR_S:
        text = f"{worst.host} is {time_text(abs(worst.ahead_s))} {word} rank 0's node"
        fix = "tell the site: its nodes should keep time by NTP; logs and deadlines rely on it"
        yield Finding("clocks", "warning", text, fix, {"ahead_s": values})
    else:
        bound = max(abs(clock.ahead_s) + clock.within_s for clock in clocks)
        text = f"the nodes agree within {time_text(bound)}"
        yield Finding("clocks", "ok", text, values={"ahead_s": values})


def _ask(comm: Communicator, head: int) -> Clock:
    theirs = np.zeros(1)
    best = Clock(comm.topology.hosts[head], 0.0, float("inf"))
    for _ in range(_ROUNDS):
        sent_s = time.time()
        comm.isend(np.zeros(1), head).wait()
        comm.irecv(theirs, head).wait()
        arrived_s = time.time()
        within_s = (arrived_s - sent_s) / 2
        if within_s < best.within_s:
            best = Clock(best.host, float(theirs[0]) - (sent_s + arrived_s) / 2, within_s)
    return best


def _answer(comm: Communicator) -> None:
    asked = np.zeros(1)
    for _ in range(_ROUNDS):
        comm.irecv(asked, 0).wait()
        comm.isend(np.array([time.time()]), 0).wait()
