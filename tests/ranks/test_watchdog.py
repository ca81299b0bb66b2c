from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from hpctrain.transport.communicator import Communicator
from hpctrain.transport.watchdog import Watchdog


def wait_until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def watch(
    comm: Communicator, abort_s: float | None = None
) -> tuple[Watchdog, list[str], list[int]]:
    messages: list[str] = []
    codes: list[int] = []
    dog = Watchdog(
        comm, ["fc", "conv"], 0.5, abort_s, messages.append, codes.append, heartbeat_s=0.05
    )
    assert dog.note is None
    return dog, messages, codes


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("missing", [0, 1])
def test_the_missing_rank_is_named(missing: int, comm: Communicator) -> None:
    """By rank 0, also when it is rank 0 that all others wait for."""
    dog, messages, codes = watch(comm)
    done = comm.split(0)
    assert done is not None
    if comm.rank == missing:
        dog.beat(7, "compute")
        time.sleep(1.5)
    else:
        dog.beat(7, "exchange", 1)
    comm.barrier()
    dog.beat(8, "compute")
    dog.close()
    if comm.rank == 0:
        named = [message for message in messages if "wait for 1" in message]
        assert named, messages
        assert f"missing: rank {missing} (" in named[0]
        assert "in compute of step 7" in named[0]
        assert "in exchange of step 7, bucket 1 (conv)" in named[0]
        assert "test_watchdog.py" in named[0]
        assert len(named) == 1
    else:
        assert messages == []
    assert codes == []


@pytest.mark.ranks(2)
def test_a_long_stall_ends_all_ranks(comm: Communicator) -> None:
    dog, messages, codes = watch(comm, abort_s=1.0)
    dog.beat(3, "compute")
    if comm.rank == 0:
        wait_until(lambda: codes)
        assert codes == [70]
        assert "ending all ranks" in messages[-1]
    comm.barrier()
    dog.close()


@pytest.mark.ranks(2, 4)
def test_a_moving_run_is_left_alone(comm: Communicator) -> None:
    dog, messages, codes = watch(comm, abort_s=1.0)
    for step in range(20):
        dog.beat(step, "compute")
        comm.allreduce(np.zeros(10))
        time.sleep(0.05)
    dog.close()
    assert (messages, codes) == ([], [])


@pytest.mark.ranks(2)
def test_other_ranks_speak_when_rank_0_is_frozen(comm: Communicator) -> None:
    """Rank 0's watchdog thread is silenced, as in a process that was stopped."""
    dog, messages, codes = watch(comm, abort_s=1.5)
    dog.beat(4, "exchange")
    if comm.rank == 0:
        dog._stop.set()
    else:
        wait_until(lambda: codes)
        assert "this rank 1 is in exchange of step 4" in messages[0]
        assert "rank 0 (" in messages[0]
        assert "does not answer" in messages[0]
        assert codes == [70]
    comm.barrier()
    dog.close()
