"""The measures against sklearn and their definitions, and the evaluation as a whole."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from anomalyd import Detector
from anomalyd.detect.conformal import clopper_pearson, false_alarm_band
from anomalyd.detect.evaluate import auroc, evaluate, fpr95, sample
from anomalyd.errors import AlphaUnreachable, SourceError, UsageError
from anomalyd.sources import open_source

scores = st.lists(st.integers(-5, 5), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return Detector.load(tiny.tiny_bundle(tmp_path_factory.mktemp("bundle")), device="cpu")


@pytest.fixture
def source_of(tmp_path):
    def make(images, name="x"):
        np.save(tmp_path / f"{name}.npy", images)
        return open_source(tmp_path / f"{name}.npy")

    return make


@given(scores, scores)
def test_auroc_matches_sklearn_with_ties(normal, outliers):
    """Outliers are the positive class, and ties count half."""
    labels = [0] * len(normal) + [1] * len(outliers)
    assert auroc(normal, outliers) == pytest.approx(roc_auc_score(labels, normal + outliers))


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


def test_evaluation_follows_its_definitions(detector, source_of):
    """Each number recomputed from verdicts one image at a time."""
    normal = tiny.draw(300, seed=50)
    bright = np.clip(tiny.draw(150, seed=51).astype(int) * 2, 0, 255).astype(np.uint8)
    result = evaluate(detector, source_of(normal), {"bright": source_of(bright, "b")}, alpha=0.05)
    verdicts, strange = detector.score(normal, alpha=0.05), detector.score(bright, alpha=0.05)
    flagged = sum(v.outlier for v in verdicts)
    caught = sum(v.outlier for v in strange)
    found = result.outliers["bright"]
    assert result.n == 300
    assert result.bits_per_dim == pytest.approx(np.mean([v.bits_per_dim for v in verdicts]))
    assert result.false_alarms.observed == flagged / 300
    assert result.false_alarms.band == false_alarm_band(0.05, 199, 300)
    assert found.recall == caught / 150
    assert found.recall_ci95 == clopper_pearson(caught, 150)
    a, b = ([v.score for v in each] for each in (verdicts, strange))
    assert found.auroc == pytest.approx(auroc(a, b))
    assert found.fpr95 == pytest.approx(fpr95(a, b))
    assert set(found.scores) == {"typicality", "nll", *tiny.STATISTICS}


def test_json_has_the_keys_of_the_contract(detector, source_of):
    """The object that is printed: names, nesting, finite numbers, outlier sets by name."""
    sets = {name: source_of(tiny.draw(50, seed=i), name) for i, name in enumerate("ab", 60)}
    result = evaluate(detector, source_of(tiny.draw(80, seed=62)), sets).to_dict()
    assert list(result) == [
        "bundle",
        "score",
        "likelihood",
        "n",
        "bits_per_dim",
        "false_alarm_rate",
        "auroc",
        "fpr95",
        "recall",
        "scores",
    ]
    assert set(result["false_alarm_rate"]) == {"alpha", "observed", "n", "band"}
    assert set(result["recall"]["a"]) == {"alpha", "value", "ci95"}
    assert set(result["auroc"]) == set(result["fpr95"]) == {"a", "b"}
    assert set(result["scores"]["nll"]["auroc"]) == {"a", "b"}
    json.dumps(result, allow_nan=False)


def test_without_outliers_there_are_still_false_alarms(detector, source_of):
    """Normal images alone are worth an evaluation."""
    result = evaluate(detector, source_of(tiny.draw(60, seed=63)), {}).to_dict()
    assert result["auroc"] == {}
    assert result["false_alarm_rate"]["n"] == 60


def test_a_sample_is_seeded_in_order_and_without_repeats(source_of):
    """The same seed takes the same images; another takes others."""
    source = source_of(np.arange(100, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2))

    def indices(seed, limit=20):
        return [item.index for item in sample(source, limit, seed)]

    assert indices(1) == indices(1) != indices(2)
    assert indices(1) == sorted(set(indices(1)))
    assert len(indices(1)) == 20
    assert indices(1, 1000) == indices(1, None) == list(range(100))
    with pytest.raises(UsageError, match="--limit"):
        sample(source, 0, 0)


def test_a_sample_is_fair():
    """Each image is as likely to be taken as any other."""

    class Numbers:
        name = "numbers"

        def __len__(self):
            return 10

        def __iter__(self):
            return iter(range(10))

    taken = Counter(x for seed in range(2000) for x in sample(Numbers(), 3, seed))
    assert all(abs(taken[x] - 600) < 100 for x in range(10))


def test_seen_images_are_left_out_and_named(detector, source_of):
    """One training image among 200 is dropped; it counts nowhere."""
    images = tiny.draw(200, seed=64)
    images[7] = tiny.draw(400, seed=1)[3]  # of the fit split
    result = evaluate(detector, source_of(images), {})
    assert result.n == 199
    assert [name.rpartition("#")[2] for name in result.seen["normal"]] == ["7"]


def test_many_seen_images_are_refused(detector, source_of):
    """More than one in a hundred: this is no test set."""
    images = np.concatenate([tiny.draw(3, seed=1), tiny.draw(150, seed=65)])
    with pytest.raises(SourceError, match=r"3 of 153 images were seen in training"):
        evaluate(detector, source_of(images), {})


def test_nothing_readable_is_an_error(detector, tmp_path):
    """The set is named."""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SourceError, match=r"normal .*none of its images can be read"):
        evaluate(detector, open_source(tmp_path), {})


def test_unreachable_alpha_is_told_before_anything_is_read(detector):
    """No source is opened for an alpha that cannot be had."""
    with pytest.raises(AlphaUnreachable):
        evaluate(detector, None, {}, alpha=1e-6)
