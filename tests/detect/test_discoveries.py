"""False discoveries in batches: the promise over splits, and what the numbers mean."""

from __future__ import annotations

import numpy as np
import pytest

from anomalyd.detect.conformal import p_table
from anomalyd.detect.discoveries import discoveries


def scores(n, shift=0.0, seed=0):
    return np.random.default_rng([seed, n]).normal(size=n) + shift


@pytest.mark.parametrize("q", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("n", [199, 1500])
def test_the_mean_share_of_false_flags_keeps_to_q(n, q):
    """At most q within 2 standard errors, whether outliers stand far off or near."""
    sets = {"far": scores(120, 6, 1), "near": scores(150, 2, 2)}
    found = discoveries(scores(n), scores(600, seed=3), sets, p_table(n), q)
    for result in found.values():
        assert result.mean_fdp <= q + 2 * result.standard_error
    assert found["far"].power > 0.99 > found["near"].power
    # Far outliers are all flagged, and Benjamini-Hochberg then spends 90 % of q.
    assert found["far"].mean_fdp == pytest.approx(0.9 * q, rel=0.15)


def test_every_split_draws_its_own_calibration_set():
    """One calibration set that never flags a normal image does not hide what others would do."""
    strange = np.sort(scores(5000))[-199:]
    found = discoveries(strange, scores(600, seed=3), {"far": scores(90, 9)}, p_table(199), 0.2)
    assert found["far"].mean_fdp > 0.1


def test_a_batch_has_the_share_of_outliers_asked_for():
    """All normals where there are outliers enough, else fewer normals; at least one of each."""

    def sizes(normals, outliers):
        sets = {"x": scores(outliers, 5)}
        found = discoveries(scores(99), scores(normals), sets, p_table(99), 0.1, splits=2)["x"]
        return found.batch - found.outliers, found.outliers

    assert sizes(900, 500) == (900, 100)
    assert sizes(900, 20) == (180, 20)
    assert sizes(3, 500) == (3, 1)


def test_splits_are_seeded():
    """The same seed gives the same numbers; another gives others."""

    def mean(seed):
        sets = {"x": scores(60, 2)}
        return discoveries(scores(99), scores(300), sets, p_table(99), 0.1, seed=seed)["x"]

    assert mean(0) == mean(0) != mean(1)
