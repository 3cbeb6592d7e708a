"""The evaluation as a whole: every number from its definition, every doubt said."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import tiny
from PIL import Image
from sklearn.metrics import roc_auc_score

from anomalyd import Detector
from anomalyd.detect.conformal import clopper_pearson, false_alarm_band
from anomalyd.detect.evaluate import ALPHAS, SHOWN, evaluate, sample
from anomalyd.detect.measures import auroc, fpr95, separation
from anomalyd.errors import AlphaUnreachable, SourceError, UsageError
from anomalyd.sources import open_evaluation, open_source


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return Detector.load(tiny.tiny_bundle(tmp_path_factory.mktemp("bundle")), device="cpu")


@pytest.fixture
def source_of(tmp_path):
    def make(images, name="x"):
        np.save(tmp_path / f"{name}.npy", images)
        return open_source(tmp_path / f"{name}.npy")

    return make


def test_evaluation_follows_its_definitions(detector, source_of):
    """Each number recomputed from verdicts one image at a time."""
    normal = tiny.draw(300, seed=50)
    bright = np.clip(tiny.draw(150, seed=51).astype(int) * 2, 0, 255).astype(np.uint8)
    result = evaluate(detector, source_of(normal), {"bright": source_of(bright, "b")}, alpha=0.05)
    verdicts, strange = detector.score(normal, alpha=0.05), detector.score(bright, alpha=0.05)
    flagged = sum(v.outlier for v in verdicts)
    caught = sum(v.outlier for v in strange)
    found, level = result.outliers["bright"], result.level
    assert len(result.normal) == 300
    assert result.bits_per_dim == pytest.approx(np.mean([v.bits_per_dim for v in verdicts]))
    assert level.observed == flagged / 300
    assert level.band == false_alarm_band(0.05, 199, 300)
    assert level.recall["bright"].value == caught / 150
    assert level.recall["bright"].ci95 == clopper_pearson(caught, 150)
    a, b = ([v.score for v in each] for each in (verdicts, strange))
    assert found.verdict == separation(a, b, 150 / 450)
    assert found.verdict.auroc == pytest.approx(auroc(a, b))
    assert found.verdict.fpr95 == pytest.approx(fpr95(a, b))
    assert list(found.scores) == ["typicality", "nll", *tiny.STATISTICS]
    expected = separation(tiny.nll(normal), tiny.nll(bright), 150 / 450)
    assert found.scores["nll"].auroc == pytest.approx(expected.auroc, abs=1e-4)


def test_every_alpha_that_can_be_reached_is_counted(detector, source_of):
    """The usual ones at 199 calibration images, and the one asked for."""
    normal, bright = tiny.draw(300, seed=50), tiny.draw(90, seed=52) // 2 + 128
    result = evaluate(detector, source_of(normal), {"x": source_of(bright, "b")}, alpha=0.03)
    assert [level.alpha for level in result.levels] == [0.005, 0.01, 0.02, 0.03, 0.05, 0.1]
    assert set(ALPHAS) >= {level.alpha for level in result.levels} - {0.03}
    for level in result.levels:
        flags = [v.outlier for v in detector.score(normal, alpha=level.alpha)]
        assert level.observed == np.mean(flags)
        caught = [v.outlier for v in detector.score(bright, alpha=level.alpha)]
        assert level.recall["x"].value == pytest.approx(np.mean(caught))


def test_json_has_the_keys_of_the_contract(detector, source_of):
    """The object that is printed: names, nesting, finite numbers, outlier sets by name."""
    sets = {name: source_of(tiny.draw(50, seed=i), name) for i, name in enumerate("ab", 60)}
    result = evaluate(detector, source_of(tiny.draw(80, seed=62)), sets).to_dict()
    assert set(result) == {
        "bundle",
        "score",
        "likelihood",
        "n",
        "bits_per_dim",
        "false_alarm_rate",
        "auroc",
        "auroc_ci95",
        "aupr",
        "fpr95",
        "recall",
        "scores",
        "alphas",
        "fdr",
        "metadata_auroc",
        "seen",
        "warnings",
    }
    assert set(result["false_alarm_rate"]) == {"alpha", "observed", "n", "band"}
    assert set(result["recall"]["a"]) == {"alpha", "value", "ci95"}
    for measures in (result, *result["scores"].values()):
        assert set(measures["auroc"]) == set(measures["fpr95"]) == {"a", "b"}
        assert measures["aupr"]["a"]["base_rate"] == pytest.approx(50 / 130, abs=1e-6)
        low, high = measures["auroc_ci95"]["b"]
        assert low < measures["auroc"]["b"] < high
    assert result["scores"]["typicality"]["auroc"] == result["auroc"]
    json.dumps(result, allow_nan=False)


def test_false_discoveries_keep_to_q(detector, source_of):
    """In 200 batches with a tenth of outliers, within 2 standard errors; seeded."""
    sets = {"bright": source_of(tiny.draw(90, seed=61) // 2 + 128, "b")}
    normal = source_of(tiny.draw(800, seed=62))
    fdr = evaluate(detector, normal, sets, fdr=0.2).to_dict()["fdr"]
    assert (fdr["q"], fdr["splits"], fdr["outliers"]) == (0.2, 200, 0.1)
    assert fdr["mean_fdp"]["bright"] <= 0.2 + 2 * fdr["standard_error"]["bright"]
    assert fdr["power"]["bright"] > 0.99
    assert evaluate(detector, normal, sets, fdr=0.2).to_dict()["fdr"] == fdr
    assert evaluate(detector, normal, sets, fdr=0.2, seed=1).to_dict()["fdr"] != fdr
    with pytest.raises(AlphaUnreachable, match=r"^--fdr 0.001 needs 999"):
        evaluate(detector, normal, sets, fdr=0.001)


def test_a_base_rate_can_be_asked_for(detector, source_of):
    """AUPR at one outlier in a hundred, whatever the sets hold."""
    normal, strange = source_of(tiny.draw(80, seed=62)), source_of(tiny.draw(40, seed=63), "b")
    found = evaluate(detector, normal, {"x": strange}, base_rate=0.01)
    own = evaluate(detector, normal, {"x": strange})
    assert found.to_dict()["aupr"]["x"]["base_rate"] == 0.01
    assert found.outliers["x"].verdict.aupr < 0.2 < own.outliers["x"].verdict.aupr
    with pytest.raises(UsageError, match="--base-rate"):
        evaluate(detector, normal, {"x": strange}, base_rate=1.0)


def test_without_outliers_there_are_still_false_alarms(detector, source_of):
    """Normal images alone are worth an evaluation."""
    result = evaluate(detector, source_of(tiny.draw(60, seed=63)), {}).to_dict()
    assert result["auroc"] == result["fdr"]["mean_fdp"] == {}
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
    assert len(result.normal) == 199
    assert result.to_dict()["seen"] == {"normal": 1}
    assert [name.rpartition("#")[2] for name in result.seen["normal"]] == ["7"]


def test_many_seen_images_are_refused(detector, source_of):
    """More than one in a hundred: this is no test set."""
    images = np.concatenate([tiny.draw(3, seed=1), tiny.draw(150, seed=65)])
    with pytest.raises(SourceError, match=r"3 of 153 images were seen in training"):
        evaluate(detector, source_of(images), {})


def test_nothing_readable_is_an_error(detector, tmp_path):
    """The set is named."""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SourceError, match=r"normal .*none of .* the first, .*a\.png: "):
        evaluate(detector, open_source(tmp_path), {})


def test_unreachable_alpha_is_told_before_anything_is_read(detector):
    """No source is opened for an alpha that cannot be had."""
    with pytest.raises(AlphaUnreachable):
        evaluate(detector, None, {}, alpha=1e-6)


def test_the_extremes_are_kept_and_no_more(detector, source_of):
    """The strangest normal images and the most normal outliers, those first, the first of ties."""
    normal, strange = tiny.draw(200, seed=70), tiny.draw(100, seed=71) // 3 + 170
    strange[40:] = strange[40]
    result = evaluate(detector, source_of(normal), {"x": source_of(strange, "b")})
    for images, kept, sign in (
        (normal, result.normal.extremes, -1),
        (strange, result.outliers["x"].sample.extremes, 1),
    ):
        scores = np.array([verdict.score for verdict in detector.score(images)])
        expected = np.argsort(sign * scores, kind="stable")[:SHOWN]
        assert [item.index for item in kept] == expected.tolist()


@pytest.fixture
def root(tmp_path):
    """An MVTec-style root of 4x4 images: every scratch is one bright row, its mask that row."""
    for folder in ("train/good", "test/good", "test/scratch", "test/dust", "ground_truth/scratch"):
        (tmp_path / folder).mkdir(parents=True)
    for i, pixels in enumerate(tiny.draw(30, seed=92)):
        picture = pixels[..., 0].copy()
        Image.fromarray(picture).save(tmp_path / f"test/good/{i}.png")
        Image.fromarray(255 - picture).save(tmp_path / f"test/dust/{i}.png")
        mask = np.zeros((4, 4), np.uint8)
        mask[i % 4] = 255
        Image.fromarray(picture | mask).save(tmp_path / f"test/scratch/{i}.png")
        # Masks larger than the map are fitted to it.
        Image.fromarray(mask.repeat(3, 0).repeat(3, 1)).save(
            tmp_path / f"ground_truth/scratch/{i}_mask.png"
        )
    return tmp_path


def test_maps_are_held_against_masks(detector, root):
    """Pixels of masked outliers and of normal images count, of sets without masks none."""
    given = open_evaluation(root)
    result = evaluate(detector, given.normal, given.outliers, masks=given.masks)
    printed = result.to_dict()
    assert set(printed["auroc"]) == {"dust", "scratch"}
    assert set(printed["pixel_auroc"]) == set(printed["aupro"]) == {"scratch"}
    values, marked = [], []
    for kind in ("good", "scratch"):
        for i in range(30):
            pixels = np.asarray(Image.open(root / "test" / kind / f"{i}.png"))
            values.append(np.round(tiny.NLL[pixels], 3))
            marked.append(np.zeros((4, 4), bool))
            marked[-1][i % 4] = kind == "scratch"
    expected = roc_auc_score(np.ravel(marked), np.ravel(values))
    assert printed["pixel_auroc"]["scratch"] == pytest.approx(expected, abs=1e-3)
    assert 0.8 < printed["aupro"]["scratch"] <= 1
    assert printed["localisation"]["sets"] == ["scratch"]
    assert printed["localisation"]["aupro"] == printed["aupro"]["scratch"]
    assert printed["warnings"] == []


def test_masks_that_are_missing_or_broken_are_told(detector, root, tmp_path_factory):
    """Such images count in no pixel measure; a bundle without maps does without."""
    (root / "ground_truth/scratch/3_mask.png").unlink()
    (root / "ground_truth/scratch/7_mask.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    given = open_evaluation(root)
    result = evaluate(detector, given.normal, given.outliers, masks=given.masks)
    assert result.outliers["scratch"].localisation is not None
    assert [name.rpartition("/")[2] for name, _ in result.unreadable] == ["7_mask.png"]
    assert result.warnings == [
        "scratch: 2 of 30 images have no mask and count in no pixel measure"
    ]


def test_outliers_that_their_headers_betray_are_told(detector, tmp_path):
    """Larger outliers, or JPEG ones, could be told without a look at the pixels."""
    for name in ("normal", "large", "jpeg", "alike"):
        (tmp_path / name).mkdir()
    for i, pixels in enumerate(tiny.draw(40, seed=93)):
        picture = Image.fromarray(pixels[..., 0])
        picture.save(tmp_path / "normal" / f"{i}.png")
        picture.save(tmp_path / "alike" / f"{i}.bmp")
        picture.save(tmp_path / "jpeg" / f"{i}.jpg")
        picture.resize((8, 8) if i % 4 else (4, 4)).save(tmp_path / "large" / f"{i}.png")
    sets = {name: open_source(tmp_path / name) for name in ("alike", "jpeg", "large")}
    result = evaluate(detector, open_source(tmp_path / "normal"), sets)
    found = result.to_dict()["metadata_auroc"]
    assert found["alike"]["value"] == 0.5
    assert found["jpeg"] == {"feature": "codec", "value": 1.0}
    assert found["large"] == {"feature": "width", "value": 0.875}
    assert [warning.split(":")[0] for warning in result.warnings] == ["jpeg", "large"]
    assert "width alone" in result.warnings[1]


def test_normal_images_of_another_kind_are_doubted(detector, source_of):
    """Far more false alarms than promised: they are not like the calibration images."""
    result = evaluate(detector, source_of(tiny.draw(100, seed=94) // 2 + 40), {})
    assert result.level.observed > 0.5
    assert "calibrate on such images" in result.warnings[0]
