"""The detector on a density that is known in closed form."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalyd import Detector
from anomalyd.detect.bundle import Golden, pack_golden
from anomalyd.detect.runtime import Raw, Session, available_cpus
from anomalyd.detect.statistics import LARGEST, Fit, make_score, typicality
from anomalyd.errors import (
    AlphaUnreachable,
    BundleError,
    CorruptImage,
    EmptyImage,
    UsageError,
    WrongSize,
)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return Detector.load(tiny.tiny_bundle(tmp_path_factory.mktemp("bundle")), device="cpu")


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(stream, "PNG")
    return stream.getvalue()


def raw_of(detector, *nlls):
    """Raw scores of images with these negative log-likelihoods, in nats."""
    statistics = np.zeros((len(nlls), len(detector.manifest.statistics)), np.float32)
    return Raw(-np.array(nlls, np.float64)[:, None], statistics)


def test_verdict_holds_the_contract(detector):
    """Every field follows from its definition on a density whose -log p(x) is known."""
    images = tiny.draw(50, seed=8)
    nll = tiny.nll(images)
    score = tiny.typicality(nll, detector.calibration.fit_nll)
    verdicts = detector.score(images, alpha=0.05)
    calibration = detector.calibration.scores
    for i, verdict in enumerate(verdicts):
        p_value = (1 + np.sum(calibration >= verdict.score)) / (len(calibration) + 1)
        assert verdict.bits_per_dim == pytest.approx(nll[i] / (16 * math.log(2)), abs=1e-5)
        assert verdict.score == pytest.approx(score[i], abs=0.01)
        assert verdict.p_value == p_value
        assert verdict.outlier is bool(p_value <= 0.05)
        assert (verdict.likelihood, verdict.score_name) == ("exact", "typicality")
        assert verdict.alpha == 0.05


def test_every_form_of_an_image_gets_one_verdict(detector, tmp_path):
    """Path, text, bytes, (H, W, C), (H, W), a list, a generator, a stack: one answer."""
    image = tiny.draw(1, seed=5)[0]
    path = tmp_path / "x.png"
    path.write_bytes(png(image))
    expected = detector.score(image)
    for form in (path, str(path), png(image), memoryview(png(image)), image[..., 0]):
        assert detector.score(form) == expected
    for many in ([image, path], (form for form in (path, png(image))), np.stack([image, image])):
        assert detector.score(many) == [expected, expected]
    assert detector.score([]) == []


def test_verdicts_do_not_depend_on_the_batch(detector):
    """An image alone and among 76 others is judged alike."""
    images = tiny.draw(77, seed=6)
    together = detector.score(images)
    assert [detector.score(image) for image in images] == together


def test_to_dict_leaves_out_what_is_absent(detector):
    """Optional fields are missing, not null, and the order is the contract's."""
    verdict = detector.score(tiny.draw(1)[0])
    assert list(verdict.to_dict()) == [
        "bits_per_dim",
        "likelihood",
        "score",
        "score_name",
        "p_value",
        "alpha",
        "outlier",
    ]
    assert dataclasses.replace(verdict, q_value=0.5).to_dict()["q_value"] == 0.5


def test_a_rejected_image_has_the_label_null(detector):
    """Where classes were looked at, the label is there, null if none fits."""
    verdict = detector.score(tiny.draw(1)[0])
    rejected = dataclasses.replace(verdict, posterior={"a": 1.0}, rejected=True, reason="novel")
    assert list(rejected.to_dict())[7:] == ["label", "posterior", "rejected", "reason"]
    assert rejected.to_dict()["label"] is None
    given = dataclasses.replace(rejected, label="a", rejected=False, reason=None)
    assert list(given.to_dict())[7:] == ["label", "posterior", "rejected"]


@pytest.mark.parametrize("make", [tiny.tiny_classifier, tiny.tiny_autoencoder])
def test_what_has_no_density_cannot_score(tmp_path, make):
    """One line says why and what the bundle is good for."""
    with pytest.raises(BundleError, match=r"no density to score by; .*`anomalyd embed`") as caught:
        Detector.load(make(tmp_path), device="cpu")
    tiny.check_line(caught.value)


def test_bright_images_are_outliers(detector):
    """What the density finds improbable is flagged at the smallest p-value."""
    verdict = detector.score(np.full((4, 4), 255, np.uint8))
    assert verdict.outlier
    assert verdict.p_value == 1 / 200


def test_too_simple_images_are_outliers_as_well(detector):
    """The trap of raw likelihoods: an all-black image is the likeliest of all, and is flagged."""
    black = detector.score(np.zeros((4, 4), np.uint8))
    assert black.bits_per_dim < min(v.bits_per_dim for v in detector.score(tiny.draw(200)))
    assert black.outlier


def test_bad_images_raise_their_own_error(detector):
    """The type says in which way an image is bad."""
    with pytest.raises(CorruptImage):
        detector.score(png(tiny.draw(1)[0])[:50])
    with pytest.raises(WrongSize, match="9x4"):
        detector.score([np.zeros((4, 9), np.uint8)])
    with pytest.raises(WrongSize, match="uint8"):
        detector.score(np.zeros((4, 4)))


@pytest.mark.parametrize("nll", [math.inf, -math.inf, math.nan, 1e308, -1e308])
def test_no_verdict_holds_a_number_that_json_does_not_know(detector, nll):
    """Whatever the graph says, the verdict is finite, and strange."""
    with np.errstate(all="raise"):
        (verdict,) = detector.judge(raw_of(detector, nll), 0.05)
    numbers = (verdict.bits_per_dim, verdict.score, verdict.p_value)
    assert all(map(math.isfinite, numbers))
    assert verdict.outlier
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))


def test_the_image_that_cannot_be_read_is_named(detector, tmp_path):
    """By its path, or by its place where it has none."""
    good = tiny.draw(1)[0]
    with pytest.raises(CorruptImage, match=r"nope\.png: "):
        detector.score([good, tmp_path / "nope.png"])
    with pytest.raises(EmptyImage, match=r"^image 1: "):
        detector.score([good, b""])
    with pytest.raises(EmptyImage, match=r"^image is empty"):
        detector.score(b"")


def test_a_default_an_ulp_below_the_smallest_p_value_still_flags(tmp_path):
    """Older bundles have such a default: the alpha is then what their calibration reaches."""
    below = float(np.nextafter(1 / 21, 0))
    detector = Detector.load(tiny.tiny_bundle(tmp_path, n=20, default_alpha=below), device="cpu")
    verdict = detector.score(np.full((4, 4), 255, np.uint8))
    assert verdict.outlier
    assert verdict.alpha == verdict.p_value == 1 / 21 > below


def test_alpha_is_the_default_or_checked(detector):
    """None takes the bundle's; only one that was asked for is refused, with what is missing."""
    assert detector.alpha(None) == 0.01
    assert detector.alpha(0.2) == 0.2
    with pytest.raises(AlphaUnreachable, match=r"needs 999 calibration images.*with 800 more"):
        detector.alpha(0.001)
    with pytest.raises(UsageError):
        detector.alpha(2.0)


def test_classes_are_summed_out(tmp_path):
    """p(x) = sum over classes of p(y) p(x|y), priors uniform where the bundle has none."""
    detector = Detector.load(tiny.tiny_bundle(tmp_path), device="cpu")
    raw = Raw(
        np.log(
            [[0.1, 0.3], [0.0, 0.5]],
            where=[[True, True], [False, True]],
            out=np.full((2, 2), -np.inf),
        ),
        np.zeros((2, 2), np.float32),
    )
    np.testing.assert_allclose(np.exp(-detector.nll(raw)), [0.2, 0.25])


def test_explanations_are_two_sided_and_marked(detector):
    """An unadjusted p-value on either side of the fit split, and the word diagnostic."""
    pixels = np.stack([np.zeros((4, 4, 1)), np.full((4, 4, 1), 255)]).astype(np.uint8)
    raw = detector.session.run(pixels)
    for row in range(2):
        explained = detector.explain(raw, row)
        assert list(explained) == detector.manifest.statistics
        entry = explained["mean_intensity"]
        assert entry["value"] == (0.0, 255.0)[row]
        assert entry["p_value"] == pytest.approx(2 / 401)
        assert entry["diagnostic"] is True


def test_a_graph_that_misses_its_golden_scores_is_refused(tmp_path):
    """1e-5 bits/dim is the limit on the CPU; the error says by how much it is off."""
    golden = tiny.tiny_golden()
    nats = 16 * math.log(2)
    off = Golden(golden.images, golden.log_likelihood + 3e-5 * nats, golden.statistics)
    path = tiny.tiny_bundle(tmp_path, files={"golden.npz": pack_golden(off)})
    with pytest.raises(BundleError, match=r"tiny: .*off by 3e-05 bits/dim on CPUExecution"):
        Detector.load(path, device="cpu")
    fine = Golden(golden.images, golden.log_likelihood + 5e-6 * nats, golden.statistics)
    path = tiny.tiny_bundle(tmp_path, name="fine", files={"golden.npz": pack_golden(fine)})
    Detector.load(path, device="cpu")


def test_statistics_are_held_to_the_golden_ones(tmp_path):
    """A graph whose statistics moved is not the one that was calibrated."""
    golden = tiny.tiny_golden()
    off = Golden(golden.images, golden.log_likelihood, golden.statistics * np.float32(1.01))
    path = tiny.tiny_bundle(tmp_path, files={"golden.npz": pack_golden(off)})
    with pytest.raises(BundleError, match="golden statistics: the graph is off by more"):
        Detector.load(path, device="cpu")


def test_an_unknown_score_is_refused(tmp_path):
    """A bundle that rests on a score this version lacks says so."""
    with pytest.raises(BundleError, match=r"clairvoyance.*upgrade"):
        Detector.load(tiny.tiny_bundle(tmp_path, score_name="clairvoyance"), device="cpu")


def test_unknown_devices_are_refused(tmp_path):
    """A device is auto, cpu or cuda."""
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        Detector.load(tiny.tiny_bundle(tmp_path), device="tpu")


# Scores


nlls = st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=40)


@given(nlls, nlls)
def test_typicality_lies_in_the_half_unit_within_the_fit_split_and_above_it_outside(fit, new):
    """[0, 1/2] between the fit split's extremes, above 1/2 beyond them."""
    fit, new = np.sort(fit), np.array(new)
    score = typicality(new, fit)
    inside = (new >= fit[0]) & (new <= fit[-1])
    assert np.all((score >= 0) & (score[inside] <= 0.5).all())
    assert np.all(score[~inside] >= 0.5)


@given(nlls)
def test_typicality_is_the_distance_of_the_mid_rank(fit):
    """At the fit split's own values F is the share below plus half the share that ties."""
    fit = np.sort(fit)
    below = (fit[None, :] < fit[:, None]).mean(axis=1)
    ties = (fit[None, :] == fit[:, None]).mean(axis=1)
    np.testing.assert_allclose(typicality(fit, fit), np.abs(below + ties / 2 - 0.5), atol=1e-12)


def test_far_outliers_stay_ordered():
    """Beyond either end a larger distance is a larger score: no ties among outliers."""
    fit = np.linspace(1000.0, 2000.0, 101)
    high = typicality(np.array([2001.0, 2500.0, 9000.0]), fit)
    low = typicality(np.array([999.0, 500.0, -9000.0]), fit)
    assert np.all(np.diff(high) > 0)
    assert np.all(np.diff(low) > 0)
    np.testing.assert_allclose(high[0], 0.5 + 1 / 500)  # one nat, the IQR being 500


def test_a_constant_fit_split_gives_finite_scores():
    """Without any spread the unit is one nat."""
    np.testing.assert_allclose(typicality(np.array([5.0, 7.0]), np.full(10, 5.0)), [0.0, 2.5])


def test_nll_is_a_score_of_its_own():
    """The plain likelihood, clamped to what JSON can hold."""
    score = make_score("nll", Fit(np.array([1.0]), np.zeros((1, 1))))
    np.testing.assert_array_equal(score(np.array([3.0, np.inf]), np.zeros((2, 1))), [3.0, LARGEST])


# Runtime


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 77])
def test_batches_are_powers_of_two_and_cover_everything(n):
    """onnxruntime sees few shapes; no image is lost or padded."""
    session = Session(tiny.tiny_model().SerializeToString(), device="cpu")
    batches = list(session._batches(n))
    assert [start for start, _ in batches] == [0, *(stop for _, stop in batches[:-1])]
    assert batches[-1][1] == n
    assert all((stop - start).bit_count() == 1 for start, stop in batches)


def test_maps_come_on_demand():
    """(N, H, W) nats a pixel that add up to -log p(x), fetched only where asked for."""
    session = Session(tiny.tiny_model().SerializeToString(), device="cpu")
    images = tiny.draw(40)
    assert session.run(images).nll_map is None
    raw = session.run(images, nll_map=True)
    np.testing.assert_allclose(raw.nll_map.sum(axis=(1, 2)), -raw.log_likelihood[:, 0], rtol=1e-5)


def test_features_come_from_graphs_that_have_them():
    """(N, E), row by row with the rest; None from a graph without an encoder."""
    session = Session(tiny.tiny_encoder("classifier").SerializeToString(), device="cpu")
    images = tiny.draw(40)
    raw = session.run(images)
    np.testing.assert_allclose(raw.embedding, tiny.embedding(images), rtol=1e-5)
    chosen = raw[np.array([3, 1])]
    assert np.array_equal(chosen.log_posterior, raw.log_posterior[[3, 1]])
    assert np.array_equal(Raw.concat([raw, chosen]).embedding[40:], chosen.embedding)
    without = Session(tiny.tiny_model().SerializeToString(), device="cpu")
    assert without.run(images).embedding is None


@pytest.mark.parametrize(
    ("threads", "batches"), [(1, [8, 8, 4, 1]), (2, [8, 8, 4, 1]), (4, [4] * 5 + [1])]
)
def test_progress_is_told_batch_by_batch(threads, batches):
    """The numbers add up to the images, and what the caller raises ends the run."""
    graph = tiny.tiny_model().SerializeToString()
    session = Session(graph, device="cpu", threads=threads, batch=8)
    done = []
    session.run(tiny.draw(21), progress=done.append)
    assert sorted(done, reverse=True) == batches
    told = []

    def stop(images):
        told.append(images)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.run(tiny.draw(800), progress=stop)
    assert len(told) <= threads


@given(st.integers(1, 70), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_threads_share_the_batches_and_keep_the_order(n, threads):
    """However many threads there are, each image gets its own answer."""
    images = tiny.draw(n)
    session = Session(
        tiny.tiny_model().SerializeToString(), device="cpu", threads=threads, batch=8
    )
    log_p = session.run(images).log_likelihood[:, 0]
    np.testing.assert_allclose(log_p, -tiny.nll(images), rtol=1e-5)


def test_what_onnxruntime_refuses_is_a_bundle_error():
    """Neither a broken graph nor a wrong shape ends in onnxruntime's own exceptions."""
    with pytest.raises(BundleError, match="onnxruntime refuses it"):
        Session(b"no graph at all", device="cpu")
    session = Session(tiny.tiny_model().SerializeToString(), device="cpu")
    with pytest.raises(BundleError, match="fails on images"):
        session.run(np.zeros((1, 5, 4, 1), np.uint8))


def test_available_cpus_respects_a_quota(tmp_path, monkeypatch):
    """A container's quota counts, in both versions of control groups, and "max" is none."""
    from anomalyd.detect import runtime

    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert runtime._cgroup_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert runtime._cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").unlink()
    assert runtime._cgroup_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert runtime._cgroup_quota(tmp_path) == 2.0
    monkeypatch.setattr(runtime, "_cgroup_quota", lambda root: 0.2)
    assert available_cpus() == 1


LOAD = """
import sys
from anomalyd import Detector
Detector.load(sys.argv[1], device="cpu")
"""


@pytest.mark.parametrize(("asked", "files"), [({}, False), ({"ORT_DISABLE_TELEMETRY": "0"}, True)])
def test_onnxruntime_reports_home_only_where_asked(asked, files, tmp_path):
    """It keeps a device id and a queue of reports in the home folder unless it is told not to."""
    bundle = tiny.tiny_bundle(tmp_path / "bundle")
    home = tmp_path / "home"
    home.mkdir()
    # Nothing else is passed on: it also keeps still where it sees that it is in CI.
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    subprocess.run(
        [sys.executable, "-c", LOAD, str(bundle)],
        check=True,
        env=kept | {"HOME": str(home), "OMP_NUM_THREADS": "1"} | asked,
    )

    assert any(home.rglob("deviceid")) == files
