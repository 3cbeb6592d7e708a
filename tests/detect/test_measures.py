"""The measures against sklearn and their definitions, ties included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from anomalyd.detect.measures import (
    aupr,
    auroc,
    auroc_interval,
    caught,
    fpr95,
    separation,
)

scores = st.lists(st.integers(-5, 5), min_size=1, max_size=40)


def labels(normal, outliers):
    return [0] * len(normal) + [1] * len(outliers)


@given(scores, scores)
def test_auroc_matches_sklearn_with_ties(normal, outliers):
    """Outliers are the positive class, and ties count half."""
    expected = roc_auc_score(labels(normal, outliers), normal + outliers)
    assert auroc(normal, outliers) == pytest.approx(expected)


@given(scores, scores)
def test_aupr_at_the_rate_of_the_sets_is_sklearns_average_precision(normal, outliers):
    """Outliers are what is looked for; the base rate is their share."""
    rate = len(outliers) / (len(normal) + len(outliers))
    expected = average_precision_score(labels(normal, outliers), normal + outliers)
    assert aupr(normal, outliers, rate) == pytest.approx(expected)


@given(scores, scores, st.floats(0.01, 0.99))
def test_aupr_at_another_rate_is_that_of_weighted_images(normal, outliers, rate):
    """Any share of outliers can be asked for, whatever the sets hold."""
    weights = [(1 - rate) / len(normal)] * len(normal) + [rate / len(outliers)] * len(outliers)
    expected = average_precision_score(
        labels(normal, outliers), normal + outliers, sample_weight=weights
    )
    assert aupr(normal, outliers, rate) == pytest.approx(expected)


@given(scores, scores)
def test_fpr95_is_the_rate_at_the_highest_threshold_that_catches_95_percent(normal, outliers):
    """Found by trying every threshold."""
    normal, outliers = np.array(normal), np.array(outliers)
    thresholds = [t for t in outliers if np.mean(outliers >= t) >= 0.95]
    assert fpr95(normal, outliers) == np.mean(normal >= max(thresholds))


def test_fpr95_is_no_true_positive_rate_of_normals():
    """19 of 20 outliers above all normals: 95 % are caught without one false alarm."""
    assert fpr95(range(100), [*range(200, 219), -1]) == 0.0
    assert fpr95(range(100), [*range(200, 218), -1, -1]) == 1.0


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=30, unique=True), st.data())
def test_caught_lies_on_sklearns_curve(values, data):
    """Where scores do not tie, it is the highest point at each number of false alarms."""
    kinds = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    normal = [value for value, kind in zip(values, kinds, strict=True) if not kind] or [99.0]
    outliers = [value for value, kind in zip(values, kinds, strict=True) if kind] or [98.0]
    x, y, _ = roc_curve(labels(normal, outliers), normal + outliers, drop_intermediate=False)
    found = caught(normal, outliers, np.arange(len(normal) + 1))
    for count, share in enumerate(found):
        at = np.isclose(x, count / len(normal))
        assert share == pytest.approx(y[at].max())


@given(scores, scores)
def test_caught_never_takes_more_false_alarms_than_it_says(normal, outliers):
    """Ties between a normal image and an outlier are not counted as caught."""
    for count, share in enumerate(caught(normal, outliers, np.arange(len(normal) + 1))):
        thresholds = {*normal, *outliers, 99}
        allowed = [t for t in thresholds if np.sum(np.asarray(normal) >= t) <= count]
        assert share == pytest.approx(max(np.mean(np.asarray(outliers) >= t) for t in allowed))


@pytest.mark.parametrize("area", [0.7, 0.95, 0.995, 0.9995])
@pytest.mark.parametrize("spread", [1, 3])
@pytest.mark.parametrize(("normals", "outliers"), [(300, 20), (100, 100), (40, 500)])
def test_the_interval_holds_the_true_area(area, spread, normals, outliers):
    """Gaussian scores, 500 draws: 95 % of them, 92 % at the least, also where 1.0 is usual."""
    rng = np.random.default_rng(0)
    shift = np.sqrt(1 + spread**2) * stats.norm.ppf(area)
    held = 0
    for _ in range(500):
        strange = spread * rng.normal(size=outliers) + shift
        low, high = auroc_interval(rng.normal(size=normals), strange)
        held += low <= area <= high
    assert held / 500 > 0.92


def test_the_interval_has_delongs_width_where_that_is_known():
    """Far from 1, A +- 1.96 DeLong standard errors, by their definition over all pairs."""
    rng = np.random.default_rng(1)
    normal, outliers = rng.normal(size=2000), 3 * rng.normal(size=1500) + 1
    wins = (outliers[:, None] > normal) + 0.5 * (outliers[:, None] == normal)
    error = np.sqrt(wins.mean(1).var(ddof=1) / 1500 + wins.mean(0).var(ddof=1) / 2000)
    low, high = auroc_interval(normal, outliers)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.01)
    assert (low + high) / 2 == pytest.approx(wins.mean(), abs=1e-3)


def test_a_perfect_area_is_no_certainty():
    """1.0 on a handful of outliers has an honest lower end; more images raise it."""
    normal = np.arange(200)
    few, many = auroc_interval(normal, normal[:5] + 999), auroc_interval(normal, normal + 999)
    assert few[1] == many[1] == 1.0
    assert 0.5 < few[0] < 0.8 < 0.99 < many[0] < 1
    assert auroc_interval(normal, [-1])[0] == 0.0


@given(scores, scores)
def test_the_interval_holds_the_area_seen_and_mirrors(normal, outliers):
    """Within [0, 1]; the other sign of the score gives the mirrored interval."""
    low, high = auroc_interval(normal, outliers)
    assert 0 <= low <= auroc(normal, outliers) <= high <= 1
    mirrored = auroc_interval([-x for x in normal], [-x for x in outliers])
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_separation_is_all_of_them():
    """One call, the same numbers."""
    normal, outliers = [1, 2, 3, 4], [3, 4, 5]
    found = separation(normal, outliers, 0.2)
    assert found.auroc == auroc(normal, outliers)
    assert found.auroc_ci95 == auroc_interval(normal, outliers)
    assert found.aupr == aupr(normal, outliers, 0.2)
    assert found.fpr95 == fpr95(normal, outliers)
