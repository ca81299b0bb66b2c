"""Measures what a message costs here: latency, and seconds per byte sent."""

from __future__ import annotations

import statistics
import time

import numpy as np

from hpctrain.compress.wire import Coding
from hpctrain.exchange.density import SecondCost
from hpctrain.exchange.shard import KINDS
from hpctrain.transport.communicator import Communicator

_REPEATS = 5
_LARGE = 1 << 17


def second_cost(
    comm: Communicator, kind: str, coding: Coding, compute_s: float = 0.0
) -> SecondCost:
    """Collective. Seconds of a step by the bits of its payload, equal on all ranks.

    Args:
        comm: The parties; some all-gathers of 128 KiB per party go over it.
        kind: The sparse exchange, which decides how often a bit of payload is sent.
        coding: How entries travel.
        compute_s: Time of a step that communication does not hide; the largest of all ranks counts.
    """
    if comm.size == 1:
        return SecondCost(0.0, 0.0, compute_s)
    small, large = (_median_s(comm, nbytes) for nbytes in (8, _LARGE))
    found = np.array([small, max(large - small, 0.0), compute_s])
    comm.allreduce(found, "max")
    latency_s, large_s, compute_s = found.tolist()
    per_byte_s = large_s / (_LARGE * (comm.size - 1))
    sent_per_payload_byte = KINDS[kind].sent_bytes(comm.size, coding, 1000) / (
        1000 * coding.entry_bytes()
    )
    return SecondCost(latency_s, per_byte_s * sent_per_payload_byte / 8, compute_s)


def _median_s(comm: Communicator, nbytes: int) -> float:
    send, recv = np.zeros(nbytes, np.uint8), np.zeros(nbytes * comm.size, np.uint8)
    seconds = []
    for _ in range(_REPEATS):
        comm.barrier()
        began = time.perf_counter()
        comm.iallgather(send, recv).wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
