"""The figures of the documentation are drawn from the records that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks.figures import FIGURES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_from_its_records_and_shown(name, tmp_path):
    FIGURES[name](ROOT / "benchmarks" / "results").savefig(tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    assert (ROOT / "docs" / "figures" / f"{name}.svg").exists()
    pages = [page.read_text() for page in (ROOT / "docs").rglob("*.md")]
    assert any(f"figures/{name}.svg)" in page for page in pages)
