from __future__ import annotations

import itertools
import os

import numpy as np
import pytest

from hpctrain.errors import BackendError
from hpctrain.transport import mpi, mpi_window
from hpctrain.transport.algorithm import RING_FROM_BYTES
from hpctrain.transport.communicator import Communicator


def ring_sum(parts: list[np.ndarray]) -> np.ndarray:
    """The sum as a ring computes it: block b begins at rank b and goes round."""
    size = len(parts)
    blocks = [np.array_split(part, size) for part in parts]
    sums = []
    for block in range(size):
        order = [blocks[(block + step) % size][block] for step in range(size)]
        sums.append(list(itertools.accumulate(order, np.add))[-1])
    return np.concatenate(sums)


def gaussian(rank: int, length: int) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal(length).astype(np.float32)


@pytest.mark.ranks(3, 4)
def test_big_all_reduces_run_a_ring_and_small_ones_do_not(comm: Communicator) -> None:
    """By the order of additions, which the bits of a float32 sum show from 3 ranks on."""
    if not mpi.facts()["allreduce"].startswith("ring"):
        pytest.skip(f"the all-reduce is not hpctrain's choice here: {mpi.facts()['allreduce']}")
    at = RING_FROM_BYTES // 4
    for length, is_ring in ((1000, False), (at - 1, False), (at, True), (3 * at + 5, True)):
        mine = gaussian(comm.rank, length)
        comm.allreduce(mine)
        expected = ring_sum([gaussian(rank, length) for rank in range(comm.size)])
        assert np.array_equal(mine, expected) == is_ring


@pytest.mark.ranks(1, 2)
def test_facts(comm: Communicator) -> None:
    facts = mpi.facts()
    assert facts["mpi_thread_level"] == "multiple"
    assert facts["allreduce"] == comm.algorithm
    assert mpi.start() is mpi.start()
    assert not [name for name in os.environ if name.endswith("dynamic_rules_filename")]


@pytest.mark.ranks(2)
def test_too_little_shared_memory_is_an_error_on_all_ranks(comm: Communicator) -> None:
    with pytest.raises(BackendError, match="MiB free"):
        comm.node().window(1 << 50 if comm.rank == 0 else 0)
    window = comm.node().window(16)
    window.close()
    assert mpi_window.backing_folders()


def start_and(then: str) -> str:
    return (
        "import sys, threading, time\n"
        "from hpctrain.errors import DataError\n"
        "from hpctrain.transport import mpi\n"
        "comm = mpi.start()\n"
        f"{then}\n"
    )


FAILURES = {
    "exception": ("if comm.rank == 1: raise ValueError('boom')\ncomm.barrier()", 70, "boom"),
    "thread": (
        "def fail(): raise OSError('gone')\n"
        "if comm.rank == 1: threading.Thread(target=fail).start()\n"
        "comm.barrier() if comm.rank == 0 else time.sleep(60)",
        70,
        "in thread",
    ),
    "exception with buckets under way": (
        "import torch\n"
        "reducer = mpi.MpiReducer(comm, names=['a', 'b'])\n"
        "try:\n"
        "  reducer.start(0, torch.ones(5))\n"
        "  if comm.rank == 1: raise ValueError('boom')\n"
        "  reducer.start(1, torch.ones(5))\n"
        "  reducer.finish()\n"
        "finally:\n"
        "  reducer.close()",
        70,
        "boom",
    ),
    "one rank exits": (
        "with mpi.guard().guarded():\n  if comm.rank == 1: sys.exit(75)\n  comm.barrier()",
        75,
        "exits with code 75 while other ranks go on",
    ),
    "all ranks exit": ("with mpi.guard().guarded():\n  sys.exit(75)", 75, ""),
}


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("then", "code", "said"), FAILURES.values(), ids=FAILURES)
def test_a_failing_rank_takes_all_down_with_its_code(
    then: str, code: int, said: str, run_ranks: object
) -> None:
    done = run_ranks(2, "-c", start_and(then))  # type: ignore[operator]
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert ("[rank 1/2 " in done.stderr) == bool(said)
