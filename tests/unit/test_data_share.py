from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from data_files import load_on

from hpctrain.data import Digits
from hpctrain.data.share import Survey, load_once
from hpctrain.errors import ConfigError, DataError, HpctrainError
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import run_threads

SHAPES = {"a": ((3, 5), np.uint8), "b": ((7,), np.float32), "none": ((0, 4), np.int64)}


def write(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    for number, array in enumerate(arrays.values()):
        array[:] = np.arange(array.size).reshape(array.shape) + number
    return {"later": 2.5}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_rank_fills_and_all_see_it(size):
    surveyed = []

    def load(comm: Communicator):
        def survey() -> Survey:
            surveyed.append(comm.rank)
            return Survey(SHAPES, write, {"early": "x"})

        return load_once(comm.node(), survey)

    for shared in run_threads(size, load):
        assert shared.facts == {"early": "x", "later": 2.5}
        for number, (name, (shape, dtype)) in enumerate(SHAPES.items()):
            expected = np.arange(np.prod(shape)).reshape(shape).astype(dtype) + dtype(number)
            np.testing.assert_array_equal(shared.arrays[name], expected)
            assert shared.arrays[name].dtype == dtype
            assert shared.arrays[name].flags.aligned
    assert surveyed == [0]


def test_ranks_of_a_node_hold_the_same_memory_and_nodes_do_not():
    def load(comm: Communicator):
        return load_once(comm.node(), lambda: Survey(SHAPES, write)).arrays["b"]

    first, second, other = run_threads(3, load, node_of=[0, 0, 1])
    assert np.shares_memory(first, second)
    assert not np.shares_memory(first, other)


def test_data_are_read_only():
    for data in load_on(2, Digits()):
        with pytest.raises(ValueError, match="read-only"):
            data.train.inputs[0] = 1


@pytest.mark.parametrize("phase", ["survey", "fill"])
@pytest.mark.parametrize("error", [DataError("bad byte 7"), ConfigError("bad key")])
def test_an_error_of_the_filling_rank_is_raised_on_all(phase, error):
    def fail(*_: Any) -> Any:
        raise error

    def load(comm: Communicator) -> str:
        survey = fail if phase == "survey" else lambda: Survey(SHAPES, fail)
        with pytest.raises(type(error)) as caught:
            load_once(comm.node(), survey)
        comm.barrier()  # nobody is left waiting in the load
        return str(caught.value)

    assert run_threads(3, load) == [str(error)] * 3


def test_a_defect_on_the_filling_rank_reaches_the_others_too():
    def load(comm: Communicator) -> str:
        with pytest.raises(ZeroDivisionError if comm.rank == 0 else HpctrainError) as caught:
            load_once(comm.node(), lambda: Survey(SHAPES, lambda arrays: 1 // 0))
        comm.barrier()
        return str(caught.value)

    messages = run_threads(2, load)
    assert "ZeroDivisionError" in messages[1]
