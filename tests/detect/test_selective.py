"""Risk and coverage, by their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalyd.detect.selective import augrc, aurc, calibration_error, coverage_at_risk

SAMPLES = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40)


def split(pairs) -> tuple[np.ndarray, np.ndarray]:
    return np.array([c / 6 for c, _ in pairs]), np.array([w for _, w in pairs])


def test_the_areas_follow_their_definitions():
    """Accepted one by one: the mean of risks, and the mean of errors over all images."""
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    wrong = np.array([False, True, False, True])

    assert aurc(confidence, wrong) == pytest.approx(np.mean([0, 1 / 2, 1 / 3, 2 / 4]))
    assert augrc(confidence, wrong) == pytest.approx(np.mean([0, 1 / 4, 1 / 4, 2 / 4]))


@given(SAMPLES, st.randoms(use_true_random=False))
def test_the_order_of_ties_does_not_matter(pairs, random):
    """Images of one confidence are accepted in shares."""
    shuffled = random.sample(pairs, len(pairs))

    assert aurc(*split(pairs)) == pytest.approx(aurc(*split(shuffled)))
    assert augrc(*split(pairs)) == pytest.approx(augrc(*split(shuffled)))


@given(SAMPLES)
def test_the_areas_lie_where_they_can(pairs):
    """0 for no error, at most 1 and 1/2 and a bit; a perfect order is the best order."""
    confidence, wrong = split(pairs)
    best = np.where(wrong, -1.0, 1.0)

    assert 0 <= aurc(best, wrong) <= aurc(confidence, wrong) + 1e-12 <= 1 + 1e-9
    assert 0 <= augrc(best, wrong) <= augrc(confidence, wrong) + 1e-12


@given(SAMPLES, st.floats(0.1, 10))
def test_equal_weights_are_no_weights(pairs, weight):
    """Only the share of an image in the whole counts."""
    confidence, wrong = split(pairs)
    weights = np.full(len(pairs), weight)

    assert aurc(confidence, wrong, weights) == pytest.approx(aurc(confidence, wrong))
    assert augrc(confidence, wrong, weights) == pytest.approx(augrc(confidence, wrong))


def test_a_heavy_image_takes_its_share_of_the_coverage():
    """Half of the coverage is one wrong image: (1/4) 0 + (1/2) (1/2 / 3/4) + (1/4) (1/2)."""
    confidence, wrong = np.array([0.9, 0.5, 0.1]), np.array([False, True, False])

    area = aurc(confidence, wrong, np.array([1.0, 2.0, 1.0]))
    assert area == pytest.approx(0.5 * (2 / 3) + 0.25 * 0.5)


def test_coverage_at_a_risk_is_the_largest():
    """Of ten, nine right ones come first: at 10 % all of them, at 1 % nine."""
    confidence, wrong = np.linspace(1, 0.1, 10), np.arange(10) == 9

    assert coverage_at_risk(confidence, wrong, 0.1) == pytest.approx(1)
    assert coverage_at_risk(confidence, wrong) == pytest.approx(0.9)
    assert coverage_at_risk(confidence, ~wrong) == 0


def test_a_sure_and_wrong_posterior_is_off_by_one():
    """Right as often as it says, the error is 0; always sure and always wrong, it is 1."""
    assert calibration_error(np.ones(8), np.ones(8, bool)) == pytest.approx(1)
    half = np.full(10, 0.5)
    assert calibration_error(half, np.arange(10) % 2 == 0) == pytest.approx(0)
