"""Every exchange over MPI; one host is one node, so single ranks are the parties of most rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from contract import exchanges

from hpctrain.exchange.auto import Auto
from hpctrain.exchange.topk import Topk
from hpctrain.transport.communicator import Communicator

Check = Callable[[Communicator, exchanges.Row], None]


def alone(row: exchanges.Row) -> exchanges.Row:
    """Every rank a party of its own."""
    if not isinstance(row.config, Topk | Auto):
        return row
    return replace(row, config=row.config.model_copy(update={"hierarchy": False}))


SHARED = [row for row in exchanges.TOPK if row.config.hierarchy][:2]
"""Of these the ranks share a window and are one party."""
ROWS = [alone(row) for row in exchanges.ROWS] + [
    replace(row, name=f"{row}-one-node") for row in SHARED
]
LATE = [alone(row) for row in exchanges.ROWS if row.name.startswith(("gather", "excl", "own", "a"))]


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_contract(row: exchanges.Row, comm: Communicator) -> None:
    for check in exchanges.CHECKS[: 3 if comm.size < 4 else 1]:
        check(comm, row)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("row", [alone(row) for row in exchanges.TOPK[::4]], ids=str)
@pytest.mark.parametrize("check", exchanges.TOPK_CHECKS, ids=lambda check: check.__name__)
def test_topk(check: Check, row: exchanges.Row, comm: Communicator) -> None:
    check(comm, row)


@pytest.mark.ranks(2)
def test_optimisers_of_torch(comm: Communicator) -> None:
    exchanges.an_optimiser_of_torch_takes_the_gradient(comm, alone(exchanges.TOPK[1]))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("row", exchanges.TEXTBOOK, ids=str)
def test_textbook(row: exchanges.Row, comm: Communicator) -> None:
    exchanges.gather_is_the_textbook_algorithm(comm, row)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("row", [row for row in LATE if not isinstance(row.config, Auto)], ids=str)
def test_delays_change_nothing(row: exchanges.Row, comm: Communicator) -> None:
    exchanges.delays_change_nothing(comm, row)
