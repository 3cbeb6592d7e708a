"""Parts of the card that a training need not run for."""

from __future__ import annotations

import numpy as np
import pytest

from anomalyd.detect.card import histogram


@pytest.mark.parametrize(
    ("scores", "threshold"),
    [
        (np.sort(np.random.default_rng(0).normal(1, 1, 5000)), 3.3),
        (np.linspace(-2, 0.9, 101), np.nextafter(0.9, 1)),  # none of them is an outlier
        (np.linspace(-3, -1, 300), -1.0),
        (np.array([0.1, 0.2, 40.0]), 0.3),  # the last row holds what is far beyond
        (np.full(120, 0.5), np.nextafter(0.5, 1)),
    ],
)
def test_the_line_of_a_histogram_parts_outliers_from_the_rest(scores, threshold):
    """Rows above it count the scores below the threshold, rows below it all others."""
    rows = histogram(scores, threshold).splitlines()[1:-1]
    (line,) = [number for number, row in enumerate(rows) if "outlier from" in row]
    counts = [int(row.split()[-1]) for number, row in enumerate(rows) if number != line]

    assert f"outlier from {threshold:.4f}" in rows[line]
    assert sum(counts[:line]) == (scores < threshold).sum()
    assert sum(counts[line:]) == (scores >= threshold).sum()
    assert len(counts) < 45


def test_a_histogram_without_a_threshold_has_no_line():
    """Where the calibration images allow no alpha, the scores are drawn all the same."""
    rows = histogram(np.linspace(0, 1, 50), None).splitlines()[1:-1]

    assert sum(int(row.split()[-1]) for row in rows) == 50
