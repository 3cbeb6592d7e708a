"""Bayes' rule, its two ways to give no label, and what each of them promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anomalyd.detect import bayes
from anomalyd.detect.bayes import (
    Labelling,
    class_scores,
    credible,
    fit_temperature,
    label,
    log_posterior,
)
from anomalyd.detect.conformal import benjamini_hochberg, p_table, p_values, q_table, ranks
from anomalyd.detect.ranks import ranks_by_class
from anomalyd.detect.statistics import Fit, make_score
from anomalyd.detect.tables import Calibration
from anomalyd.errors import CalibrationError, UsageError

LIKELIHOODS = arrays(np.float64, (4, 3), elements=st.floats(-2000, 0))
PRIORS = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(
    lambda p: [x / sum(p) for x in p]
)


@given(LIKELIHOODS, PRIORS, st.floats(0.1, 50))
def test_a_posterior_sums_to_one(log_likelihood, priors, temperature):
    """Whatever the likelihoods, the priors and the temperature."""
    posterior = np.exp(log_posterior(log_likelihood, priors, temperature))

    assert (posterior >= 0).all()
    np.testing.assert_allclose(posterior.sum(axis=1), 1, rtol=1e-9)


@given(LIKELIHOODS, PRIORS, st.floats(-1e4, 1e4))
def test_what_all_classes_share_changes_no_posterior(log_likelihood, priors, constant):
    """log p(x|y) + c for every y is the same evidence: how usual an image is, is no label."""
    np.testing.assert_allclose(
        log_posterior(log_likelihood + constant, priors),
        log_posterior(log_likelihood, priors),
        atol=1e-8,
    )


def test_it_is_the_posterior_that_enumeration_gives():
    """Two pixels of two levels, three classes: p(y|x) from the joint table of all images."""
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.ones(4), size=3)  # p(x|y) over all four images
    priors = np.array([0.5, 0.3, 0.2])
    joint = priors[:, None] * table
    expected = (joint / joint.sum(axis=0)).T

    np.testing.assert_allclose(np.exp(log_posterior(np.log(table.T), priors)), expected)


@pytest.mark.parametrize("odd", [np.nan, -np.inf, np.inf])
def test_evidence_that_is_no_number_gives_a_posterior_all_the_same(odd):
    """JSON knows no NaN: an impossible class has probability 0, an impossible image the priors."""
    posterior = np.exp(log_posterior(np.array([[odd, -10.0], [odd, odd]]), [0.7, 0.3]))

    np.testing.assert_allclose(posterior.sum(axis=1), 1)
    np.testing.assert_allclose(posterior[1], [0.7, 0.3])


def test_the_temperature_undoes_evidence_counted_too_often():
    """Likelihoods made three times as sure as they should be are fitted with T = 3."""
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(4000, 5)) * 2
    labels = np.array([rng.choice(5, p=np.exp(row)) for row in log_posterior(honest)])

    assert fit_temperature(3 * honest, labels) == pytest.approx(3, rel=0.1)


@given(LIKELIHOODS, st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_a_dearer_rejection_rejects_no_more(log_likelihood, one, other):
    """Rejections fall as the cost of giving no label rises."""
    cheap, dear = sorted((one, other))
    none = np.zeros(4, bool)
    rejected = [
        label(
            log_likelihood,
            none,
            Labelling(reject_cost=cost),
            priors=None,
            temperature=1.0,
            label_scores=np.zeros(1),
        ).rejected
        for cost in (cheap, dear)
    ]

    assert (rejected[1] <= rejected[0]).all()


@given(LIKELIHOODS, st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_credible_labels_grow_as_their_level_falls(log_likelihood, one, other):
    """The set at a small level holds the set at a larger one."""
    scores = np.sort(np.random.default_rng(0).random(99))
    posterior = np.exp(log_posterior(log_likelihood))
    small, large = (credible(posterior, scores, level) for level in sorted((one, other)))

    assert (large <= small).all()


def test_credible_labels_hold_the_true_one_as_often_as_they_say():
    """Over many calibration sets the miss rate is at most the level, within 3 standard errors."""
    rng = np.random.default_rng(0)
    missed = []
    for _ in range(400):
        evidence = rng.normal(size=(50 + 20, 4)) * 2
        posterior = np.exp(log_posterior(evidence))
        truth = np.array([rng.choice(4, p=row) for row in posterior])
        own = 1 - posterior[np.arange(70), truth]
        kept = credible(posterior[50:], np.sort(own[:50]), 0.1)
        missed.append(1 - kept[np.arange(20), truth[50:]].mean())

    assert np.mean(missed) <= 0.1 + 3 * np.std(missed) / np.sqrt(400)


def clothes(n: int, rng: np.random.Generator) -> tuple[Fit, np.ndarray]:
    """Three classes that differ in place and spread, one of them with a long tail."""
    labels = np.arange(n) % 3
    spread = np.array([1.0, 3.0, 1.0])[labels]
    tail = np.where(labels == 2, np.abs(rng.standard_t(2, n)), 0)
    statistics = rng.normal(size=(n, 3)) * spread[:, None] + 10 * labels[:, None]
    statistics[:, 0] += tail
    return Fit(rng.normal(1000, 30, n) + tail, statistics, rng.normal(size=(n, 4)), labels), labels


def say(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """log p(x|y) of three classes: noise, and two nats for the own one, too few to be sure."""
    return 2 * np.eye(3)[labels] + rng.normal(size=(len(labels), 3))


def in_classes(score, fit, labels, rng, doubt):
    """The score of each image in each class, and the log-likelihoods that it rests on."""
    evidence = say(labels, rng)
    scores = score(fit.nll, fit.statistics, fit.codes)
    return scores, evidence, class_scores(scores, log_posterior(evidence), doubt)


@given(LIKELIHOODS, st.floats(0, 10))
def test_a_score_in_a_class_is_the_image_s_own_and_doubt(log_likelihood, doubt):
    """In the likeliest class it is the score, and nowhere less."""
    scores = np.arange(4.0)
    found = class_scores(scores, log_posterior(log_likelihood), doubt)

    np.testing.assert_array_equal(found.min(axis=1), scores)
    assert (np.diff(np.take_along_axis(found, log_likelihood.argsort(axis=1), 1)) <= 0).all()


@pytest.mark.parametrize("doubt", [0.0, 0.3])
def test_no_class_is_rejected_more_often_than_alpha(doubt):
    """p = max over classes: in each class P(p <= alpha) <= alpha, over many calibration sets."""
    rng, alpha, rates = np.random.default_rng(0), 0.1, []
    for _ in range(60):
        fit, _ = clothes(90, rng)
        score = make_score("class_nearest_normals", fit)
        held, held_labels = clothes(90, rng)
        new, labels = clothes(90, rng)
        scores, evidence, _ = in_classes(score, held, held_labels, rng, doubt)
        found = ranks_by_class(
            scores,
            evidence,
            held_labels,
            classes="abc",
            priors=None,
            temperature=1.0,
            doubt=doubt,
        )
        tables = zip(
            np.split(found["scores"], np.cumsum(found["class_counts"])[:-1]),
            [p_table(count) for count in found["class_counts"]],
            strict=True,
        )
        at = in_classes(score, new, labels, rng, doubt)[2]
        p = np.max(
            [p_values(own, *table) for own, table in zip(at.T, tables, strict=True)], axis=0
        )
        rates.append([np.mean(p[labels == y] <= alpha) for y in range(3)])
    mean, error = np.mean(rates, axis=0), np.std(rates, axis=0) / np.sqrt(60)

    assert (mean <= alpha + 3 * error).all()
    assert mean.max() > alpha / 4  # and it can reject


def test_odd_images_of_one_class_excuse_none_that_are_surely_of_another():
    """A third of class c is odder than all of a; one as odd that can only be an a is novel."""
    rng, labels = np.random.default_rng(0), np.arange(600) % 3
    scores = rng.normal(size=600) + 5 * ((labels == 2) & (rng.random(600) < 0.3))
    sure, odd = 40 * np.eye(3), np.full(1, 4.0)
    p = {}
    for doubt in (0.0, 0.1):
        found = ranks_by_class(
            scores, sure[labels], labels, classes="abc", priors=None, temperature=1.0, doubt=doubt
        )
        ends = np.cumsum(found["class_counts"])[:-1]
        at = class_scores(odd, log_posterior(sure[:1]), doubt)[0]
        ranked = zip(at, np.split(found["scores"], ends), strict=True)
        p[doubt] = max(p_values([own], those, p_table(200))[0] for own, those in ranked)

    assert p[0.0] > 0.2
    assert p[0.1] < 0.1


def test_false_discoveries_are_counted_over_the_p_values_of_all_classes():
    """Classes of unlike sizes have unlike p-values; a histogram over all of them loses none."""
    rng, counts = np.random.default_rng(0), (7, 40, 13)
    empty = np.empty(0)
    calibration = Calibration(
        fit_nll=empty,
        fit_statistics=np.empty((0, 1), np.float32),
        training_hashes=np.empty(0, np.uint64),
        calibration_hashes=np.empty(0, np.uint64),
        **ranks_by_class(
            rng.normal(size=60),
            np.zeros((60, 3)),
            np.repeat(range(3), counts),
            classes="abc",
            priors=None,
            temperature=1.0,
            doubt=0.0,
        ),
    )
    tables = calibration.per_class()
    p = np.max([p_values(rng.normal(1, 2, 90), *table) for table in tables], axis=0)
    found = ranks(p, calibration.levels)
    histogram = np.bincount(found, minlength=len(calibration.levels))

    np.testing.assert_array_equal(calibration.levels[found], p)
    np.testing.assert_allclose(
        q_table(histogram, calibration.levels)[found], benjamini_hochberg(p)
    )
    assert calibration.smallest == 1 / 8


def test_a_class_without_calibration_images_is_named():
    with pytest.raises(CalibrationError, match=r"class c: no calibration image"):
        ranks_by_class(
            np.zeros(4),
            np.zeros((4, 3)),
            np.array([0, 1, 0, 1]),
            classes="abc",
            priors=None,
            temperature=1.0,
            doubt=0.0,
        )


def test_a_confidence_trusts_likely_labels_of_usual_images():
    """It grows with the probability and with the p-value, and stays in 0..1."""
    grid = np.linspace(0.01, 1, 30)
    for low, high in itertools.pairwise(grid):
        p = np.array([0.003, 0.1, 0.9])
        assert (
            bayes.confidence(np.full(3, low), p) <= bayes.confidence(np.full(3, high), p)
        ).all()
        ordered = bayes.confidence(np.array([0.8, 0.8]), np.array([low, high]))
        assert ordered[0] <= ordered[1] <= 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"a": 0.5, "b": 0.6}, "sum to 1.1"),
        ({"a": 0.5}, "none for b"),
        ({"a": 0.5, "b": 0.4, "x": 0.1}, "x: no such class"),
        ({"a": 1.0, "b": 0.0}, "between 0 and 1"),
    ],
)
def test_priors_that_are_none_are_refused(given, says):
    with pytest.raises(UsageError, match=says):
        bayes.check_priors(given, ["a", "b"])
