"""Recalibration without torch: new tables, the same graph, the promise kept."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import tiny

from anomalyd import Detector
from anomalyd.detect.bundle import pack_calibration, read_bundle, write_bundle
from anomalyd.detect.calibrate import calibrate, calibration_half
from anomalyd.detect.card import SCORES, STRANGEST, VERDICT, histogram, promise
from anomalyd.errors import (
    AlphaUnreachable,
    BundleError,
    CalibrationError,
    SourceError,
    UsageError,
)
from anomalyd.images import content_hash
from anomalyd.sources import open_source


@pytest.fixture
def path(tmp_path):
    return tiny.tiny_bundle(tmp_path)


@pytest.fixture
def source_of(tmp_path):
    def make(images):
        np.save(tmp_path / "images.npy", images)
        return open_source(tmp_path / "images.npy")

    return make


def hashes(images):
    return np.sort(np.array([content_hash(image) for image in images], np.uint64))


def test_a_new_table_from_new_normals(path, source_of):
    """Scores, hashes, size and default alpha are the new images'; the rest stays as it was."""
    before = read_bundle(path)
    images = tiny.draw(60, seed=70)
    done = calibrate(path, source_of(images), device="cpu")
    after = read_bundle(path)
    assert (done.n, done.fitted, done.seen, done.unreadable) == (60, 0, [], [])
    assert done.default_alpha == after.manifest.default_alpha == 1 / 61
    assert after.manifest.calibration_n == 60
    np.testing.assert_array_equal(after.calibration.calibration_hashes, hashes(images))
    np.testing.assert_array_equal(after.calibration.fit_nll, before.calibration.fit_nll)
    np.testing.assert_allclose(
        after.calibration.scores,
        np.sort(tiny.typicality(tiny.nll(images), before.calibration.fit_nll)),
        atol=0.01,
    )
    assert after.model == before.model
    assert set(after.manifest.files) == set(before.manifest.files)
    assert after.read("weights.safetensors") == before.read("weights.safetensors")


def test_the_card_tells_of_the_new_calibration(path, source_of):
    """Its promise and its scores are new, the rest is what it was, and again the next time."""
    bundle = read_bundle(path)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    rest = "## Drawn from it\n\nSome.\n\n## How it was made\n\nSlowly.\n"
    verdict = f"## {VERDICT}\n\nAn image is an outlier at 1.\n\nThe score is one.\n\n"
    old = f"# tiny\n\nA density.\n\n{verdict}## {STRANGEST}\n\nThis one.\n\n{rest}"
    write_bundle(path, bundle.manifest, files | {"CARD.md": old.encode()}, replace=True)
    for n, confidence, says in (
        (60, None, "on average over calibration sets"),
        (299, 0.95, "with confidence 0.95 over the calibration set drawn"),
    ):
        calibrate(path, source_of(tiny.draw(n, seed=71)), confidence=confidence, device="cpu")
        bundle = read_bundle(path)
        card = bundle.read("CARD.md").decode()
        assert card.startswith("# tiny\n\nA density.\n\n")
        assert (
            card.count(f"## {VERDICT}\n\n{promise(bundle.manifest)}\n\nThe score is one.\n") == 1
        )
        assert f"{n} held-out normal images" in card
        assert says in card
        assert card.count(f"## {STRANGEST} of its training\n\nThis one.\n\n{rest}") == 1
        drawn = f"## {SCORES}\n\n{n} images of `"
        assert card.count(drawn) == 1
        scores = bundle.calibration.scores
        assert card.endswith(
            f"{histogram(scores, bundle.calibration.threshold(bundle.manifest.default_alpha))}\n"
        )


def test_a_card_written_by_hand_is_kept(path, source_of):
    """What is told of the calibration comes after it."""
    bundle = read_bundle(path)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    write_bundle(path, bundle.manifest, files | {"CARD.md": b"## Ours\n\nSee \xff."}, replace=True)
    calibrate(path, source_of(tiny.draw(60, seed=70)), device="cpu")
    card = read_bundle(path).read("CARD.md").decode()
    assert card.startswith(f"## Ours\n\nSee \ufffd.\n\n## {VERDICT}\n\nAn image is an outlier at")


def test_a_site_chooses_the_alpha_it_decides_at(path, source_of):
    """From then on it is the default; one that takes more images leaves the bundle as it was."""
    calibrate(path, source_of(tiny.draw(60, seed=70)), alpha=0.05, device="cpu")
    assert Detector.load(path, device="cpu").alpha(None) == 0.05
    with pytest.raises(AlphaUnreachable, match="needs 99 calibration images"):
        calibrate(path, source_of(tiny.draw(60, seed=70)), alpha=0.01, device="cpu")
    with pytest.raises(UsageError, match="alpha must lie between 0 and 1"):
        calibrate(path, source_of(tiny.draw(60, seed=70)), alpha=1.5, device="cpu")
    assert read_bundle(path).manifest.default_alpha == 0.05


def test_confidence_is_stored_and_kept(path, source_of):
    """At 95 % confidence 299 images reach 1 %, and the bundle says which promise it makes."""
    done = calibrate(path, source_of(tiny.draw(299, seed=71)), confidence=0.95, device="cpu")
    detector = Detector.load(path, device="cpu")
    assert detector.manifest.guarantee == {"kind": "conditional", "confidence": 0.95}
    assert detector.manifest.default_alpha == 0.01
    assert done.smallest_alpha == pytest.approx(1 - 0.05 ** (1 / 299))
    back = calibrate(path, source_of(tiny.draw(99, seed=72)), device="cpu")
    assert back.confidence is None
    assert read_bundle(path).manifest.guarantee == {"kind": "marginal", "confidence": None}


@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.95, 1 - 1e-9])
def test_every_confidence_gives_a_bundle_that_is_read(path, source_of, confidence):
    """Its table is held to the confidence it claims, and its default alpha can flag."""
    calibrate(path, source_of(tiny.draw(41, seed=77)), confidence=confidence, device="cpu")
    detector = Detector.load(path, device="cpu")
    assert detector.confidence == confidence
    assert detector.score(np.full((4, 4), 255, np.uint8)).outlier


def test_a_table_that_promises_less_than_its_confidence_is_refused(path, source_of):
    """A tenth of a percent is enough; so is a table that does not end with 1."""
    calibrate(path, source_of(tiny.draw(60, seed=78)), confidence=0.95, device="cpu")
    bundle = read_bundle(path)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    table = bundle.calibration.p_table
    for place, by, says in (
        (20, 0.999, "rank 21 of 60 holds with 0.94"),
        (60, 0.9999, "end with 1, not 0.9999"),
    ):
        changed = table.copy()
        changed[place] *= by
        calibration = dataclasses.replace(bundle.calibration, p_table=changed)
        files["calibration.npz"] = pack_calibration(calibration)
        with pytest.raises(BundleError, match=says):
            write_bundle(path, bundle.manifest, files, replace=True)


def test_training_images_are_refused_one_by_one(path, source_of):
    """Seen images are counted and named, and calibrate nothing."""
    images = np.concatenate([tiny.draw(400, seed=1)[:25], tiny.draw(100, seed=73)])
    done = calibrate(path, source_of(images), device="cpu")
    assert done.n == 100
    assert [name.rpartition("#")[2] for name in done.seen] == [str(i) for i in range(25)]


def test_only_training_images_are_an_error(path, source_of):
    """Nothing left to calibrate on: the bundle stays as it was."""
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(CalibrationError, match="training has seen all 400 images"):
        calibrate(path, source_of(tiny.draw(400, seed=1)), device="cpu")
    assert (path / "manifest.json").read_bytes() == before


def test_refit_fits_on_one_half_and_calibrates_on_the_other(path, source_of):
    """The halves are disjoint; what was fitted on counts as training from then on."""
    images = tiny.draw(300, seed=74)
    before = read_bundle(path).calibration
    done = calibrate(path, source_of(images), refit=True, device="cpu")
    after = read_bundle(path).calibration
    fitted = np.setdiff1d(after.training_hashes, before.training_hashes)
    assert done.n + done.fitted == 300
    assert min(done.n, done.fitted) > 100
    assert not np.isin(after.calibration_hashes, after.training_hashes).any()
    np.testing.assert_array_equal(
        np.sort(np.concatenate([fitted, after.calibration_hashes])), hashes(images)
    )
    is_fit = np.array([np.uint64(content_hash(image)) in fitted for image in images])
    np.testing.assert_allclose(after.fit_nll, np.sort(tiny.nll(images[is_fit])), rtol=1e-6)
    assert after.fit_statistics.shape == (done.fitted, len(tiny.STATISTICS))


def test_refit_needs_images_in_both_halves(path, source_of):
    """A dozen images cannot be fitted on and calibrated with."""
    with pytest.raises(CalibrationError, match="--refit leaves"):
        calibrate(path, source_of(tiny.draw(12, seed=75)), refit=True, device="cpu")


def test_a_handful_of_images_does_not_replace_a_calibration(path, source_of):
    """One image would be a table of two p-values, 0.5 and 1: ten it takes, and nothing changes."""
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(CalibrationError, match=r"9 images are left .* and 10 are needed"):
        calibrate(path, source_of(tiny.draw(9, seed=79)), device="cpu")
    assert (path / "manifest.json").read_bytes() == before
    done = calibrate(path, source_of(tiny.draw(10, seed=79)), device="cpu")
    assert (done.default_alpha, done.needed) == (1 / 11, 99)


def test_halves_never_tear_a_group_or_a_copy():
    """One group, one half; without groups the content decides, so copies stay together."""
    rng = np.random.default_rng(0)
    contents = rng.integers(0, 2**63, 500).astype(np.uint64)
    groups = [str(i) for i in rng.integers(0, 40, 500)]
    by_group = calibration_half(contents, groups)
    for name in set(groups):
        assert (
            len({bool(half) for half, g in zip(by_group, groups, strict=True) if g == name}) == 1
        )
    assert 0.2 < by_group.mean() < 0.8
    twice = calibration_half(np.concatenate([contents, contents]), [None] * 1000)
    np.testing.assert_array_equal(twice[:500], twice[500:])
    assert 0.4 < twice.mean() < 0.6


def test_copies_among_the_images_are_counted(path, source_of):
    """A folder copied twice is not twice the evidence."""
    images = tiny.draw(50, seed=76)
    done = calibrate(path, source_of(np.concatenate([images, images[:5]])), device="cpu")
    assert (done.n, done.repeated) == (55, 5)


def test_a_wrong_confidence_is_told_before_images_are_read(path):
    """95 is no confidence, 0.95 is."""
    with pytest.raises(UsageError, match="try 0"):
        calibrate(path, None, confidence=95)


def test_nothing_readable_is_an_error(path, tmp_path):
    """The source is named and the bundle stays."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(
        SourceError, match=r"none of its images can be read; the first, .*a\.png: "
    ):
        calibrate(path, open_source(folder), device="cpu")


def test_recalibrated_false_alarms_are_as_promised(tmp_path, source_of):
    """Over 40 calibration sets the mean rate on fresh normals is floor((n+1) alpha)/(n+1)."""
    alpha, n = 0.05, 60
    path = tiny.tiny_bundle(tmp_path)
    fresh = tiny.draw(2000, seed=99)
    rates = []
    for seed in range(40):
        calibrate(path, source_of(tiny.draw(n, seed=1000 + seed)), device="cpu")
        detector = Detector.load(path, device="cpu")
        rates.append(np.mean([v.outlier for v in detector.score(fresh, alpha=alpha)]))
    promised = math.floor((n + 1) * alpha) / (n + 1)
    assert abs(np.mean(rates) - promised) < 3 * np.std(rates) / math.sqrt(len(rates))
