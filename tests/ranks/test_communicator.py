from __future__ import annotations

from collections.abc import Callable

import pytest
from contract import communicators

from hpctrain.transport.communicator import Communicator


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("check", communicators.CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Communicator], None], comm: Communicator) -> None:
    check(comm)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("check", communicators.CHECKS, ids=lambda check: check.__name__)
def test_contract_on_a_part(check: Callable[[Communicator], None], comm: Communicator) -> None:
    part = comm.split(0 if comm.rank != 1 else None, key=-comm.rank)
    if part is not None:
        check(part)
