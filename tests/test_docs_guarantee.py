"""The numbers in docs/guarantee.md are computed, not remembered."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from anomalyd.detect.conformal import images_needed

PAGE = (Path(__file__).parents[1] / "docs" / "guarantee.md").read_text(encoding="utf-8")
CONFIDENCES = (None, 0.9, 0.95, 0.99)


def table():
    """alpha -> the numbers of its row."""
    below = PAGE.partition("<!-- images-needed")[2].splitlines()[3:]
    rows = [line.strip("|").split("|") for line in below[: below.index("")]]
    return {float(first): [int(cell) for cell in cells] for first, *cells in rows}


def test_table_of_images_needed_is_true():
    """Every cell is what the code asks for."""
    assert len(table()) == 6
    for alpha, cells in table().items():
        assert cells == [images_needed(alpha, confidence) for confidence in CONFIDENCES]


def test_the_example_is_true():
    """Beta(1, 99) lies above 0.01 in 37 of 100 cases."""
    assert "more than\nalpha in 37 of 100 cases" in PAGE
    assert stats.beta.sf(0.01, 1, 99) == pytest.approx(0.37, abs=0.005)
