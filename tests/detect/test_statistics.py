"""Density of states: the score made of many statistics, and the p-values it leads to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalyd.detect.conformal import p_table, p_values
from anomalyd.detect.statistics import Fit, make_score


def normal(n: int, seed: int, columns: int = 3) -> Fit:
    """Two columns that go together, and others of their own."""
    rng = np.random.default_rng(seed)
    nll = rng.normal(1000, 50, n)
    statistics = rng.normal(size=(n, columns))
    statistics[:, 0] = nll / 50 + 0.05 * rng.normal(size=n)
    return Fit(nll, statistics)


def density_of_states(fit: Fit):
    return make_score("density_of_states", fit)


def test_what_is_usual_column_by_column_can_be_strange_together():
    """A likely image with the texture of an unlikely one: each column is in the middle 90 %."""
    fit, new = normal(500, 0), normal(200, 1)
    score = density_of_states(fit)
    odd = score(np.array([1080.0]), np.array([[920 / 50, 0.0, 0.0]]))

    assert odd[0] > np.quantile(score(new.nll, new.statistics), 0.99)


def test_it_is_two_sided_and_goes_on_growing():
    """Far below and far above are both strange, the farther the stranger."""
    score = density_of_states(normal(300, 0))
    at = np.array([1000.0, 1300, 2000, 9000, 700, 0, -9000])
    statistics = np.column_stack([at / 50, np.zeros((7, 2))])
    got = score(at, statistics)

    assert got[0] < got[1] < got[2] < got[3]
    assert got[0] < got[4] < got[5] < got[6]


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e300])
def test_it_is_finite_and_large_where_a_statistic_is_not_finite(odd):
    """JSON knows no NaN; what cannot be measured is strange."""
    fit = normal(300, 0)
    score = density_of_states(fit)
    got = score(np.array([1000.0, odd]), np.array([[20.0, odd, 0.0], [20.0, 0.0, 0.0]]))

    assert np.isfinite(got).all()
    assert got.min() > score(fit.nll, fit.statistics).max()


def test_a_constant_column_and_a_single_image_give_finite_scores():
    """No spread still has a unit; five neighbours of one image are that one."""
    same = Fit(np.full(9, 7.0), np.ones((9, 2)))
    assert density_of_states(same)(np.array([7.0]), np.ones((1, 2)))[0] == pytest.approx(0)
    one = Fit(np.array([7.0]), np.ones((1, 2)))
    assert np.isfinite(density_of_states(one)(np.array([8.0]), np.zeros((1, 2)))).all()


def test_a_score_does_not_depend_on_the_batch():
    """Alone or among others, in whatever order the fit split stands."""
    fit, new = normal(400, 0), normal(150, 1)
    together = density_of_states(fit)(new.nll, new.statistics)
    order = np.random.default_rng(2).permutation(400)
    other = density_of_states(Fit(fit.nll[order], fit.statistics[order]))
    alone = [other(new.nll[i : i + 1], new.statistics[i : i + 1])[0] for i in range(150)]

    np.testing.assert_allclose(alone, together, rtol=1e-9)


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_inside_the_fit_split_only_the_ranks_of_a_column_count(seed):
    """Any increasing change of a column, of fit and image alike, leaves the score as it is."""
    rng = np.random.default_rng(seed)
    fit = normal(200, seed)
    rows = rng.choice(200, 20, replace=False)
    bent = fit.statistics.copy()
    bent[:, 1] = np.exp(fit.statistics[:, 1]) ** 3
    usual = density_of_states(fit)(fit.nll[rows], fit.statistics[rows])
    changed = density_of_states(Fit(fit.nll, bent))(fit.nll[rows], bent[rows])

    np.testing.assert_allclose(usual, changed, rtol=1e-6, atol=1e-7)


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_p_values_do_not_change_under_an_increasing_function_of_the_score(seed):
    """They rest on ranks alone."""
    rng = np.random.default_rng(seed)
    calibration, new = np.sort(rng.gamma(2.0, size=99)), rng.gamma(3.0, size=30)
    table = p_table(99)

    assert np.array_equal(
        p_values(new, calibration, table),
        p_values(np.log1p(new**3), np.log1p(calibration**3), table),
    )


def test_p_values_are_super_uniform_on_exchangeable_images():
    """P(p <= t) <= t at every t, within 4 standard errors over 1,000 calibration sets."""
    rng, fit = np.random.default_rng(0), normal(200, 0)
    score, drawn = density_of_states(fit), []
    for trial in range(1000):
        batch = normal(20, int(rng.integers(1 << 30)) + trial)
        scores = score(batch.nll, batch.statistics)
        drawn.append(p_values(scores[:1], np.sort(scores[1:]), p_table(19))[0])
    for t in np.arange(1, 21) / 20:
        rate = np.mean(np.array(drawn) <= t + 1e-12)
        assert rate <= t + 4 * np.sqrt(t * (1 - t) / 1000)
