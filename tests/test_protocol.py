"""The protocol's outlier sets are what they are called, and the same from the same seed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import protocol
import required
from glyphs import GLYPHS, draw, missing
from outlier_sets import CORRUPTIONS, DEVELOPMENT, NAMES, UNSEEN, images_of, names, outlier_set

from anomalyd.detect.detector import Detector

SHAPE = (28, 28, 1)
N = 40
ROOT = Path(__file__).parents[1]
VAE = ROOT / "trained" / "fashion-mnist-vae"


@pytest.fixture(scope="module")
def clothes(fixture_data):
    return images_of("fashion-mnist", SHAPE, N, np.random.default_rng(0), fixture_data)


def corrupted(name, images):
    return CORRUPTIONS[name](images, np.random.default_rng(1))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [SHAPE, (32, 32, 3)])
def test_a_corruption_keeps_shape_and_type_leaves_its_input_alone_and_follows_its_seed(
    name, shape
):
    images = np.random.default_rng(0).integers(0, 256, (N, *shape), dtype=np.uint8)
    before = images.copy()
    found = corrupted(name, images)
    assert found.shape == images.shape
    assert found.dtype == np.uint8
    assert not np.shares_memory(found, images)
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(found, corrupted(name, images))
    if (name, shape) != ("channels-swapped", SHAPE):
        assert (found != images).any(axis=(1, 2, 3)).all()


def test_a_patch_changes_one_square_of_four_by_four(clothes):
    changed = corrupted("patch-4x4", clothes) != clothes
    for image in changed:
        rows, columns = (np.flatnonzero(image.any(axis=axis)) for axis in ((1, 2), (0, 2)))
        assert np.ptp(rows) <= 3
        assert np.ptp(columns) <= 3
    assert changed.sum() > 14 * N  # a uniform value is seldom the one that was there


def test_a_line_is_one_value_and_all_else_is_as_it_was(clothes):
    for before, after in zip(clothes, corrupted("line", clothes), strict=True):
        rows, columns = (
            np.flatnonzero((before != after).any(axis=axis)) for axis in ((1, 2), (0, 2))
        )
        assert min(len(rows), len(columns)) == 1
        across = after[rows[0]] if len(rows) == 1 else after[:, columns[0]]
        assert len(np.unique(across)) == 1


@pytest.mark.parametrize(("name", "side"), [("shuffled-pixels", 1), ("shuffled-2x2", 2)])
def test_shuffling_keeps_every_square(clothes, name, side):
    def squares(images):
        parts = images.reshape(N, 28 // side, side, 28 // side, side).swapaxes(2, 3)
        return [sorted(map(bytes, image.reshape(-1, side * side))) for image in parts]

    assert squares(corrupted(name, clothes)) == squares(clothes)


def test_a_set_follows_its_seed_and_draws_no_image_twice(fixture_data):
    first = outlier_set("mnist", n=150, data=fixture_data)
    np.testing.assert_array_equal(first, outlier_set("mnist", n=150, data=fixture_data))
    assert (first != outlier_set("mnist", n=150, seed=1, data=fixture_data)).any()
    assert len(np.unique(first.reshape(150, -1), axis=0)) == 150


def test_grey_images_are_pasted_unscaled_into_the_middle_of_every_channel(fixture_data):
    grey = outlier_set("mnist", n=N, data=fixture_data)
    colour = outlier_set("mnist", (32, 32, 3), N, data=fixture_data)
    for channel in range(3):
        np.testing.assert_array_equal(colour[:, 2:30, 2:30, channel], grey[..., 0])
    assert colour.sum(dtype=int) == 3 * grey.sum(dtype=int)


def test_scikit_learns_digits_come_in_both_sizes():
    small, large = (outlier_set(f"sklearn-digits{end}", n=N) for end in ("", "-large"))
    assert small.shape == large.shape == (N, *SHAPE)
    assert not small[:, :4].any()
    assert large[:, :4].any()


def test_unseen_sets_are_given_only_when_asked_for():
    assert not set(DEVELOPMENT) & set(UNSEEN)
    for normal in ("mnist", "fashion-mnist", "cifar10"):
        assert not set(names(normal)) & set(UNSEEN)
        assert normal not in names(normal)
        assert set(UNSEEN) <= set(names(normal, unseen=True)) <= set(NAMES)
    assert "channels-swapped" not in names("mnist")


def test_an_unknown_set_is_refused_by_name():
    with pytest.raises(ValueError, match="'emoji': there is none; there are mnist"):
        outlier_set("emoji")


@pytest.mark.parametrize("name", GLYPHS)
def test_glyphs_are_white_on_black_whole_and_centred_by_mass_in_a_box_of_twenty(name):
    if packages := missing([name]):
        required.missing(f"the fonts of {' '.join(packages)}")
    images = draw(name, N, np.random.default_rng(0), large=False)
    again = draw(name, N, np.random.default_rng(0), large=False)
    np.testing.assert_array_equal(images, again)
    assert len(np.unique(images.reshape(N, -1), axis=0)) == N
    for image in images:
        rows, columns = (np.flatnonzero(image.any(axis=axis)) for axis in (1, 0))
        assert max(np.ptp(rows), np.ptp(columns)) < 20
        middle = np.indices((28, 28)).reshape(2, -1) @ (image.ravel() / image.sum()) + 0.5
        assert np.abs(middle - 14).max() <= 0.5 + 1e-9
    large = draw(name, N, np.random.default_rng(0), large=True)
    assert (large > 0).sum() > 1.2 * (images > 0).sum()


def test_missing_fonts_are_told_with_the_packages_that_have_them(monkeypatch, tmp_path):
    monkeypatch.setattr("glyphs.FONTS", tmp_path)
    assert missing(["symbols", "latin-serif"]) == ["fonts-dejavu-core", "fonts-dejavu-extra"]
    with pytest.raises(OSError, match="apt-get install fonts-dejavu-core`, or `make fonts`"):
        draw("symbols", 1, np.random.default_rng(0), large=False)


def test_normals_against_themselves_are_worth_nothing_and_noise_is_caught(clothes):
    compare = protocol.against(Detector.load(VAE, device="cpu"), clothes)
    same, noise = compare(clothes), compare(corrupted("noise", clothes))
    assert same["auroc"] == same["nll"] == 0.5
    assert noise["n"] == N
    assert noise["auroc"] == noise["nll"] == noise["aupr"] == noise["recall"] == 1.0
    assert noise["fpr95"] == 0.0
    assert noise["ci95"] == [pytest.approx(0.025 ** (1 / N), abs=1e-6), 1.0]


def row(auroc, nll):
    keys = {"n": 9, "aupr": 0.5, "fpr95": 0.5, "recall": 0.5, "ci95": [0.2, 0.8]}
    return {"auroc": auroc, "nll": nll} | keys


def test_keeping_a_run_of_some_sets_loses_no_row_of_the_others(monkeypatch, tmp_path):
    """Other sets, other bundles and the page around the tables stay; what was measured is new."""
    page = tmp_path / "README.md"
    page.write_text(f"before\n{protocol.BEGIN}old\n{protocol.END}after\n")
    monkeypatch.setattr(protocol, "TRAINED", tmp_path)
    monkeypatch.setattr(protocol, "RESULTS", tmp_path / "protocol.json")
    about = {"score": "some", "normal": "mnist", "alpha": 0.01, "n": 9, "false_alarms": 0.0}
    known = about | {"sets": {"blur": row(0.5, 0.625), "greek": row(0.25, 0.25)}}
    fresh = about | {"sets": {"blur": row(0.75, 0.625), "noise": row(1.0, 1.0)}}

    rows = protocol.merged(known, fresh)
    protocol.keep({"bundles": {"b": rows, "c": known}, "left_out": {}})

    kept = json.loads((tmp_path / "protocol.json").read_text())["bundles"]
    assert kept["c"] == known
    assert kept["b"]["sets"] == {**fresh["sets"], "greek": known["sets"]["greek"]}
    assert page.read_text().startswith(f"before\n{protocol.BEGIN}| bundle")
    assert page.read_text().endswith(f"{protocol.END}after\n")
    assert page.read_text().count("| greek (unseen) | 9 | 0.2500 |") == 2
    assert "| blur | 9 | 0.7500 |" in page.read_text()


def test_rows_of_other_sizes_are_not_put_side_by_side():
    known = {"n": 300, "sets": {}}
    protocol.check_comparable("b", known, limit=300, unseen=False)
    protocol.check_comparable("b", known, limit=2_000, unseen=True)  # every row is made anew
    protocol.check_comparable("b", {}, limit=2_000, unseen=False)
    with pytest.raises(SystemExit, match="of b are of 300 normal images; with --limit 300 others"):
        protocol.check_comparable("b", known, limit=2_000, unseen=False)


def test_make_protocol_measures_every_row_of_the_page():
    """With its options no set that the page has a row of is left out."""
    makefile = (ROOT / "Makefile").read_text()
    kept = json.loads((ROOT / "trained" / "protocol.json").read_text())
    (limit,) = re.findall(r"protocol\.py .*--limit (\d+) --unseen$", makefile, re.M)
    (left_out,) = re.findall(r"protocol\.py .*--leave-one-out (.*)$", makefile, re.M)
    assert set(kept["left_out"]) == set(left_out.split())
    assert set(kept["bundles"]) == set(protocol.BUNDLES)
    for bundle in kept["bundles"].values():
        assert bundle["n"] == int(limit)
        assert set(bundle["sets"]) == set(names(bundle["normal"], unseen=True))


def test_the_summary_names_the_worst_sets_and_where_plain_nll_is_better():
    bundle = {
        "score": "some",
        "n": 9,
        "alpha": 0.01,
        "false_alarms": 0.0123,
        "sets": {
            "mnist": row(0.75, 0.125),
            "blur": row(0.5, 0.625),
            "noise": row(1.0, 1.0),
            "greek": row(0.25, 0.25),
        },
    }
    left_out = {"mnist": {label: row(0.5, 0.25) | {"minutes": 3} for label in "07"}}
    page = protocol.rendered({"bundles": {"b": bundle}, "left_out": left_out})
    cells = "b | some | 0.0123 | mnist 0.7500 |  | blur 0.5000 | greek 0.2500 | 0.1250, blur"
    assert f"| {cells} |\n" in page
    assert "| greek (unseen) | 9 | 0.2500 |" in page
    assert "mnist, one class left out: a VAE of 3 minutes on one core each, mean AUROC" in page
    assert "| 7 | 9 | 0.5000 | 0.2500 |" in page
