"""Every exchange on threads: what goes in comes out or waits, and all ranks agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from contract import exchanges

from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import run_threads

LAYOUTS = [[0], [0, 1], [0, 0], [0, 1, 0], [0, 1, 2], [0, 1, 1, 0], [0, 1, 2, 3]]
EIGHT = [0, 1, 2, 0, 1, 0, 0, 3]
Check = Callable[[Communicator, exchanges.Row], None]


def spread(
    checks: list[Check],
    rows: list[exchanges.Row],
    times: int = 1,
    layouts: list[list[int]] = LAYOUTS,
) -> list[object]:
    """Every check of every row at some of the layouts, in turn."""
    cases = []
    for i, check in enumerate(checks):
        for j, row in enumerate(rows):
            for turn in range(times):
                node_of = layouts[(i + j + 3 * turn) % len(layouts)]
                name = f"{check.__name__}-{row}-{''.join(map(str, node_of))}"
                cases.append(pytest.param(check, row, node_of, id=name))
    return cases


def run(check: Check, row: exchanges.Row, node_of: list[int]) -> None:
    run_threads(len(node_of), lambda comm: check(comm, row), node_of=node_of)


FIRST, *OTHERS = exchanges.CHECKS


@pytest.mark.parametrize(
    ("check", "row", "node_of"), spread([FIRST], exchanges.ROWS, 2, [*LAYOUTS, EIGHT])
)
def test_conservation(check: Check, row: exchanges.Row, node_of: list[int]) -> None:
    run(check, row, node_of)


@pytest.mark.parametrize(("check", "row", "node_of"), spread(OTHERS, exchanges.ROWS))
def test_contract(check: Check, row: exchanges.Row, node_of: list[int]) -> None:
    run(check, row, node_of)


@pytest.mark.parametrize(("check", "row", "node_of"), spread(exchanges.TOPK_CHECKS, exchanges.TOPK))
def test_topk(check: Check, row: exchanges.Row, node_of: list[int]) -> None:
    run(check, row, node_of)


@pytest.mark.parametrize("row", exchanges.TOPK[1::4], ids=str)
@pytest.mark.parametrize("node_of", [[0], [0, 1, 0]], ids=lambda node_of: f"{len(node_of)}")
def test_optimisers_of_torch(row: exchanges.Row, node_of: list[int]) -> None:
    run(exchanges.an_optimiser_of_torch_takes_the_gradient, row, node_of)


@pytest.mark.parametrize("row", [row for row in exchanges.TOPK if row.config.xi_every], ids=str)
def test_one_value_that_is_not_finite_while_xi_is_measured(row: exchanges.Row) -> None:
    run(exchanges.one_value_that_is_not_finite_changes_nothing, row, [0, 1, 2])


TELESCOPE: list[Check] = [exchanges.all_that_came_in_is_momentum_sgd]


@pytest.mark.parametrize(("check", "row", "node_of"), spread(TELESCOPE, exchanges.TELESCOPES))
def test_telescope(check: Check, row: exchanges.Row, node_of: list[int]) -> None:
    run(check, row, node_of)


TEXTBOOK = [exchanges.gather_is_the_textbook_algorithm]


@pytest.mark.parametrize(
    ("check", "row", "node_of"), spread(TEXTBOOK, exchanges.TEXTBOOK, 4, [*LAYOUTS, EIGHT])
)
def test_textbook(check: Check, row: exchanges.Row, node_of: list[int]) -> None:
    run(check, row, node_of)


@pytest.mark.parametrize(
    ("check", "row", "node_of"), spread([exchanges.exactly_k_entries_go_out], exchanges.EXACT, 2)
)
def test_exactly_k(check: Check, row: exchanges.Row, node_of: list[int]) -> None:
    run(check, row, node_of)
