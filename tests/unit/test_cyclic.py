"""A vector shared out in blocks: what each part gets, and where it lies."""

from __future__ import annotations

import numpy as np
import pytest

from hpctrain.exchange.cyclic import Cyclic


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 5, 100, 12_345, 3 * 2**17 + 5])
def test_parts_share_all_entries_and_know_where_they_lie(n: int, parts: int) -> None:
    cyclic = Cyclic(n, parts)
    everything = np.arange(n, dtype=np.uint32)

    for part, places in enumerate(cyclic.by_part(everything)):
        assert np.array_equal(places, np.flatnonzero(everything // cyclic.block % parts == part))
        inside = cyclic.inside(everything[places])
        assert np.array_equal(inside, np.arange(cyclic.length(part)))
        assert np.array_equal(cyclic.outside(part, inside), places)


@pytest.mark.parametrize("k", [0, 1, 50, 5_000])
def test_a_selection_is_split_in_ascending_order(k: int) -> None:
    cyclic = Cyclic(12_345, 4)
    indices = np.sort(np.random.default_rng(0).choice(12_345, k, replace=False)).astype(np.uint32)

    groups = cyclic.by_part(indices)

    assert len(groups) == 4
    for part, places in enumerate(groups):
        assert np.array_equal(places, np.flatnonzero(indices // cyclic.block % 4 == part))
