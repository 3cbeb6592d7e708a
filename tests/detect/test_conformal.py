"""Ranks to p-values: the laws that the promise rests on, and the numbers scipy agrees with."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from anomalyd.detect import conformal
from anomalyd.errors import AlphaUnreachable, UsageError

CONFIDENCES = [None, 0.8, 0.95, 0.99]
scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


def p_values(new, calibration, confidence=None):
    table = conformal.p_table(len(calibration), confidence)
    return conformal.p_values(new, np.sort(np.asarray(calibration, float)), table)


@given(scores, scores)
def test_p_value_is_the_counted_rank(new, calibration):
    """p = (1 + #{calibration scores >= score}) / (n + 1), ties counted against the score."""
    expected = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in new]
    np.testing.assert_allclose(p_values(new, calibration), expected, rtol=1e-15)


@given(scores, scores, st.sampled_from(CONFIDENCES))
def test_p_values_are_bounded_and_fall_with_the_score(new, calibration, confidence):
    """A p-value is never 0, never above 1, and a stranger image never has a larger one."""
    p = p_values(np.sort(new), calibration, confidence)
    assert np.all(p >= conformal.smallest_alpha(len(calibration), confidence) * (1 - 1e-12))
    assert np.all(p <= 1)
    assert np.all(np.diff(p) <= 0)


@given(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=60),
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=60),
)
def test_increasing_transforms_change_nothing(new, calibration):
    """Only the order of scores matters: x -> x^3 + 5 leaves every p-value as it was."""

    def transform(values):
        return np.asarray(values, float) ** 3 + 5

    np.testing.assert_array_equal(
        p_values(new, calibration), p_values(transform(new), transform(calibration))
    )


@given(scores, scores, st.randoms())
def test_the_order_of_calibration_images_is_irrelevant(new, calibration, random):
    """A shuffled calibration set is the same calibration set."""
    shuffled = random.sample(calibration, len(calibration))
    np.testing.assert_array_equal(p_values(new, calibration), p_values(new, shuffled))


@given(st.lists(st.integers(0, 6), min_size=2, max_size=25))
def test_p_values_are_super_uniform_on_exchangeable_scores(pool):
    """Whichever of n + 1 scores is the new one, at most alpha (n + 1) of them give p <= alpha.

    That is the whole promise, exactly and with ties: under exchangeability each is as likely.
    """
    n = len(pool) - 1
    p = [p_values([pool[i]], pool[:i] + pool[i + 1 :])[0] for i in range(n + 1)]
    for rank in range(1, n + 2):
        assert np.sum(np.asarray(p) <= rank / (n + 1)) <= rank


def test_mean_rate_of_false_alarms_is_the_promised_one():
    """Over 2,000 draws of both sets the mean rate is floor((n+1) alpha)/(n+1)."""
    rng = np.random.default_rng(0)
    n, m, alpha = 120, 200, 0.05
    rates = [
        np.mean(p_values(rng.normal(size=m), rng.normal(size=n)) <= alpha) for _ in range(2000)
    ]
    promised = math.floor((n + 1) * alpha) / (n + 1)
    assert abs(np.mean(rates) - promised) < 2.6 * np.std(rates) / math.sqrt(len(rates))


def test_confidence_holds_for_the_calibration_set_at_hand():
    """In at least 95 % of calibration sets the true rate stays at or below alpha."""
    rng = np.random.default_rng(1)
    n, alpha, draws = 300, 0.05, 3000
    table = conformal.p_table(n, 0.95)
    flagged_ranks = np.searchsorted(table, alpha, side="right")
    thresholds = np.sort(rng.random((draws, n)), axis=1)[:, n - flagged_ranks]
    kept = np.mean(1 - thresholds <= alpha)  # uniform scores: the true rate is 1 - threshold
    assert 0.95 - 2 * math.sqrt(0.95 * 0.05 / draws) < kept


@pytest.mark.parametrize("n", [1, 2, 10, 299, 3000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_conditional_table_matches_scipy(n, confidence):
    """Rank r has scipy's C-quantile of Beta(r, n + 1 - r), or r / (n + 1) if that is larger."""
    rank = np.arange(1, n + 1)
    expected = np.maximum(stats.beta.ppf(confidence, rank, n + 1 - rank), rank / (n + 1))
    table = conformal.p_table(n, confidence)
    np.testing.assert_allclose(table[:-1], expected, rtol=1e-10)
    assert table[-1] == 1
    assert np.all(np.diff(table) > 0)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_conditional_table_flags_the_largest_rank_that_keeps_the_promise(alpha):
    """#{p_r <= alpha} is the largest l with P(Beta(l, n + 1 - l) <= alpha) >= C."""
    n, rank = 700, np.arange(1, 701)
    kept = stats.beta.cdf(alpha, rank, n + 1 - rank) >= 0.95
    table = conformal.p_table(n, 0.95)
    assert np.searchsorted(table, alpha, side="right") == kept.sum()


@pytest.mark.parametrize(
    ("alpha", "confidence", "images"),
    [
        (0.01, None, 99),
        (0.05, None, 19),
        (0.001, None, 999),
        (1 / 3, None, 2),
        (0.5, None, 1),
        (0.01, 0.95, 299),
        (0.05, 0.95, 59),
        (0.001, 0.95, 2995),
        (0.01, 0.99, 459),
    ],
)
def test_images_needed(alpha, confidence, images):
    """One image fewer does not reach alpha, this many do; 1 % at 95 % takes 299."""
    assert conformal.images_needed(alpha, confidence) == images
    assert conformal.smallest_alpha(images, confidence) <= alpha
    assert images == 1 or conformal.smallest_alpha(images - 1, confidence) > alpha


@given(st.integers(2, 5000))
def test_one_over_an_integer_needs_one_image_less(k):
    """alpha = 1/k takes exactly k - 1 images: no image is lost to rounding."""
    assert conformal.images_needed(1 / k) == k - 1


@given(st.floats(-12, 0, exclude_max=True), st.sampled_from([*CONFIDENCES, 0.1, 1 - 1e-9]))
def test_images_needed_for_any_alpha(exponent, confidence):
    """Down to 1e-12 they are counted to the last one, and at once."""
    alpha = min(max(10**exponent, 1e-12), 1 - 1e-9)
    images = conformal.images_needed(alpha, confidence)
    assert conformal.smallest_alpha(images, confidence) <= alpha
    assert images == 1 or conformal.smallest_alpha(images - 1, confidence) > alpha


@pytest.mark.parametrize("confidence", [*CONFIDENCES, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_the_default_alpha_can_flag_something(confidence):
    """To the last bit: the table's first entry is the smallest alpha, and no default is below."""
    for n in range(1, 501):
        table = conformal.p_table(n, confidence)
        assert table[0] == conformal.smallest_alpha(n, confidence)
        assert table[0] <= conformal.default_alpha(n, confidence)
        assert (np.diff(table) > 0).all()


@pytest.mark.parametrize("confidence", [1e-9, 0.1, 0.5, 0.632, 0.64])
def test_no_confidence_promises_less_than_the_average(confidence):
    """Quantiles below r / (n + 1) would: where C is small the table is the marginal one."""
    for n in (10, 299):
        table, marginal = conformal.p_table(n, confidence), conformal.p_table(n)
        assert (table >= marginal).all()
        assert (table == marginal).all() == (confidence <= 0.1)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 1 - 1e-9])
def test_a_table_holds_at_its_confidence(confidence):
    """`confidences` is the law that `p_table` was made by, as scipy has it."""
    for n in (1, 20, 3000):
        table = conformal.p_table(n, confidence)
        found, rank = conformal.confidences(table), np.arange(1, n + 1)
        expected = stats.beta.cdf(table[:-1], rank, n + 1 - rank)
        np.testing.assert_allclose(found, expected, atol=1e-10)
        assert (found >= confidence - 1e-9).all()


def test_a_table_is_made_once_and_cannot_be_changed():
    """Many bands are drawn from one table."""
    assert conformal.p_table(300, 0.95) is conformal.p_table(300, 0.95)
    with pytest.raises(ValueError, match="read-only"):
        conformal.p_table(300, 0.95)[0] = 0


@given(st.floats(1e-12, 0.5))
def test_rounding_up_is_never_below(alpha):
    """What is printed can be asked for, and is no more than 1 % above."""
    printed = float(f"{conformal.round_up(alpha):g}")
    assert alpha <= printed == conformal.round_up(alpha) <= 1.0101 * alpha


def test_default_alpha():
    """1 %, or what a small calibration set allows."""
    assert conformal.default_alpha(99) == 0.01
    assert conformal.default_alpha(49) == 0.02
    assert conformal.default_alpha(299, 0.95) == 0.01
    assert conformal.default_alpha(298, 0.95) > 0.01


def test_unreachable_alpha_names_the_images_still_needed():
    """The error counts what is missing, and the alpha it offers instead is accepted."""
    with pytest.raises(AlphaUnreachable, match=r"needs 999 .* has 150: calibrate with 849 more"):
        conformal.check_alpha(0.001, 150)
    for n in range(1, 400):
        for confidence in (None, 0.95):
            with pytest.raises(AlphaUnreachable) as caught:
                conformal.check_alpha(1e-7, n, confidence)
            hint = float(str(caught.value).split("ask for ")[1].split()[0])
            if hint < 1:
                assert conformal.check_alpha(hint, n, confidence) == hint


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, 5e-324, 9.19e-32, 9e-13, math.nan])
def test_alpha_outside_the_unit_interval_is_refused(alpha):
    """0 and 1 are no rates of false alarms; NaN is none either, nor what rounding swallows."""
    with pytest.raises(UsageError, match="alpha must lie between 0 and 1, and be at least 1e-12"):
        conformal.check_alpha(alpha, 100)


def test_nonsense_sizes_are_refused():
    """No calibration image, no test image, no confidence: each says what it needs."""
    with pytest.raises(UsageError, match="at least 1 calibration image"):
        conformal.p_table(0)
    with pytest.raises(UsageError, match="confidence must lie between"):
        conformal.p_table(10, 95)
    with pytest.raises(UsageError, match=r"at most 1 - 1e-9, not 0\.9999999999; try 0\.95"):
        conformal.p_table(10, 1 - 1e-10)
    with pytest.raises(UsageError, match="at least 1 test image"):
        conformal.false_alarm_band(0.05, 100, 0)
    with pytest.raises(UsageError, match="k <= n"):
        conformal.clopper_pearson(3, 2)


@pytest.mark.parametrize(("n", "m"), [(99, 50), (1000, 1000), (6000, 10_000), (150, 7)])
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_false_alarm_band_matches_scipy(n, m, alpha):
    """The band holds at least 99.9 % of BetaBinomial(m, l, n + 1 - l), each tail at most half."""
    flagged = math.floor((n + 1) * alpha)
    low, high = conformal.false_alarm_band(alpha, n, m)
    law = stats.betabinom(m, flagged, n + 1 - flagged)
    assert low * m == pytest.approx(law.ppf(0.0005))
    assert high * m == pytest.approx(law.ppf(0.9995))


def test_false_alarm_band_at_its_ends():
    """Where nothing can be flagged the band is 0; a conditional table narrows it downwards."""
    assert conformal.false_alarm_band(0.01, 50, 100) == (0.0, 0.0)
    marginal = conformal.false_alarm_band(0.05, 1000, 1000)
    conditional = conformal.false_alarm_band(0.05, 1000, 1000, confidence=0.95)
    assert conditional[1] < marginal[1]


@given(st.integers(0, 200), st.integers(1, 200))
def test_clopper_pearson_matches_scipy(k, n):
    """The exact interval of a proportion, ends included."""
    k = min(k, n)
    expected = stats.binomtest(k, n).proportion_ci(0.95)
    np.testing.assert_allclose(conformal.clopper_pearson(k, n), expected, atol=1e-12)


@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=80))
def test_benjamini_hochberg_matches_scipy(p):
    """q-values are scipy's adjusted p-values, ties and order included."""
    expected = stats.false_discovery_control(p)
    np.testing.assert_allclose(conformal.benjamini_hochberg(p), expected, rtol=1e-12)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=200),
    st.integers(30, 60),
    st.sampled_from(CONFIDENCES),
)
def test_a_histogram_of_p_values_gives_their_q_values(taken, n, confidence):
    """To the last bit what sorting all p-values gives, from n + 1 counts."""
    table = conformal.p_table(n, confidence)
    p = table[taken]
    ranks = conformal.ranks(p, table)
    q = conformal.q_table(np.bincount(ranks, minlength=n + 1), table)

    np.testing.assert_array_equal(ranks, taken)
    np.testing.assert_array_equal(q[ranks], conformal.benjamini_hochberg(p))
    assert np.all(np.diff(q) >= 0)


@given(
    st.integers(1, 400),
    st.integers(1, 300),
    st.sampled_from([0.01, 0.05, 0.1, 0.3]),
    st.sampled_from([None, 0.95]),
)
def test_fewest_flags_is_what_benjamini_hochberg_can_do(m, n, q, confidence):
    """That many smallest p-values are flagged, one fewer are not; more than m: none ever."""
    fewest = conformal.fewest_flags(q, n, m, confidence)

    def flagged(k):
        p = np.ones(m)
        p[:k] = conformal.smallest_alpha(n, confidence)
        return int((conformal.benjamini_hochberg(p) <= q).sum())

    if fewest > m:
        assert flagged(m) == 0
        with pytest.raises(AlphaUnreachable, match=r"^--fdr"):
            conformal.check_alpha(q, n, confidence, what="--fdr")
    else:
        assert flagged(fewest) == fewest
        assert flagged(fewest - 1) == 0
        assert conformal.check_alpha(q, n, confidence, what="--fdr") == q


def test_fewest_flags_is_the_published_formula():
    """ceil(m / (q (n + 1))), rounding included."""
    for n, m, q, flags in ((99, 1000, 0.1, 100), (5999, 10_000, 0.1, 17), (199, 21, 0.1, 2)):
        assert conformal.fewest_flags(q, n, m) == flags


def test_flags_are_counted_for_no_rate_that_rounding_swallows():
    """The same bound as for alpha: below, the count would never end."""
    with pytest.raises(UsageError, match="a false discovery rate must lie between 0 and 1"):
        conformal.fewest_flags(9.19e-32, 99, 1000)


def test_nan_is_the_strangest_score():
    """A score that is not a number is never taken for a normal one."""
    assert p_values([math.nan], [1.0, 2.0, 3.0]) == pytest.approx(0.25)
