"""Which device a rank takes, and when that is refused."""

from __future__ import annotations

import pytest
import torch

from hpctrain.hardware import choose_device
from hpctrain.transport.threads import RankError, run_threads


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that every rank sees so many GPUs."""

    def _pretend(count: int) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    return _pretend


def devices(wanted: str, size: int, node_of: tuple[int, ...] | None = None) -> list[str]:
    return run_threads(size, lambda comm: str(choose_device(wanted, comm)), node_of=node_of)


def test_auto_without_gpus_is_the_cpu(gpus):
    gpus(0)
    assert devices("auto", 2) == ["cpu", "cpu"]


def test_each_local_rank_has_its_own_gpu(gpus):
    gpus(2)
    assert devices("auto", 4, (0, 1, 0, 1)) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert devices("cpu", 2) == ["cpu", "cpu"]


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_too_few_gpus_are_refused_and_not_replaced_by_the_cpu(gpus, wanted):
    gpus(1)
    with pytest.raises(RankError, match="fewer ranks per node"):
        devices(wanted, 2)


def test_cuda_without_gpus_is_refused(gpus):
    gpus(0)
    with pytest.raises(RankError, match="shows 0"):
        devices("cuda", 1)
