"""One copy of a data set per node, and errors on all ranks, under a real MPI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import write_mnist

from hpctrain.data import Digits, Idx, Synthetic, Text
from hpctrain.data.order import SampleOrder
from hpctrain.data.spec import DataSets, Samples
from hpctrain.errors import DataError
from hpctrain.transport.communicator import Communicator

SET_BYTES = 200 << 20
ROW_BYTES = 8192
WARM_UP_BYTES = 4 << 20


def read_all(samples: Samples) -> None:
    """Touch every page from this rank, in batches that are small beside the set."""
    for start in range(0, len(samples), 16):
        samples.batch(np.arange(start, min(start + 16, len(samples))), 0)


def pss_bytes() -> int:
    """Memory of this process, shared pages divided among those that map them."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no Pss in smaps_rollup")


def pss_of_all(comm: Communicator) -> int:
    """Collective."""
    comm.barrier()
    total = np.array([pss_bytes()])
    comm.barrier()
    comm.allreduce(total)
    return int(total[0])


def shared_window(n_bytes: int, folder: Path, comm: Communicator) -> Synthetic:
    return Synthetic(n_train=n_bytes // ROW_BYTES, n_test=1, features=ROW_BYTES // 4)


def memory_map(n_bytes: int, folder: Path, comm: Communicator) -> Text:
    path = folder / f"{n_bytes}.txt"
    if comm.rank == 0:
        piece = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
        with path.open("wb") as file:
            for _ in range(n_bytes >> 20):
                file.write(piece)
    comm.barrier()
    return Text(root=str(folder), train=path.name, context=ROW_BYTES, test_fraction=0.01)


@pytest.mark.ranks(4, limit_s=180)
@pytest.mark.parametrize("make", [shared_window, memory_map])
def test_all_ranks_together_hold_one_copy(
    comm: Communicator, rank_tmp_path: Path, make: Any
) -> None:
    room = os.statvfs("/dev/shm")
    if room.f_bavail * room.f_frsize < 2 * SET_BYTES:
        pytest.skip("/dev/shm is too small for this test")
    warm_up = make(WARM_UP_BYTES, rank_tmp_path, comm).load(comm.node(), 0)
    read_all(warm_up.train)
    before = pss_of_all(comm)
    data: DataSets = make(SET_BYTES, rank_tmp_path, comm).load(comm.node(), 0)
    order = SampleOrder(len(data.train), 0, comm.rank, comm.size)
    order.next(64)
    read_all(data.train)
    grown = pss_of_all(comm) - before
    assert data.nbytes >= 0.97 * SET_BYTES
    assert grown >= 0.9 * data.nbytes, "every page should have been touched"
    assert grown <= 1.1 * data.nbytes
    data.close()
    warm_up.close()


@pytest.mark.ranks(1, 2, 3, 4)
def test_every_rank_reads_what_the_first_one_wrote(comm: Communicator) -> None:
    for config in (Digits(), Synthetic(task="mlp")):
        data = config.load(comm.node(), 0)
        for part in (data.train, data.test):
            inputs, targets = part.batch(np.arange(len(part)), 0)
            mine = inputs.numpy().tobytes() + targets.numpy().tobytes()
            assert len(set(comm.allgather_bytes(mine))) == 1
        data.close()


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("damage", ["missing", "truncated", "label"])
def test_an_error_of_the_filling_rank_is_raised_on_all(
    comm: Communicator, rank_tmp_path: Path, damage: str
) -> None:
    if comm.rank == 0:
        write_mnist(rank_tmp_path)
        images = rank_tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
        labels = rank_tmp_path / "mnist" / "t10k-labels-idx1-ubyte"
        if damage == "missing":
            images.unlink()
        elif damage == "truncated":
            images.write_bytes(images.read_bytes()[:-20])
        else:
            labels.write_bytes(labels.read_bytes()[:-1] + b"\xff")
    comm.barrier()
    with pytest.raises(DataError) as caught:
        Idx(root=str(rank_tmp_path)).load(comm.node(), 0)
    messages = comm.allgather_bytes(str(caught.value).encode())
    assert len(set(messages)) == 1
    expected = {"missing": "not found", "truncated": "truncated", "label": "label 255 of record 11"}
    assert expected[damage] in messages[0].decode()
