"""The report: complete, self-contained, and safe whatever names and images it is given."""

from __future__ import annotations

import base64
import os
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny
from PIL import Image

from anomalyd import Detector
from anomalyd.detect import plots
from anomalyd.detect.evaluate import SHOWN, evaluate
from anomalyd.detect.report import OUTLINE, check_report, html, write_report
from anomalyd.errors import AnomalydError, MissingExtra, UsageError
from anomalyd.images import decode
from anomalyd.sources import open_evaluation, open_source

HOSTILE = "<script>alert('x')</script> & \"$\\frac$\" [red] \u68d2"
VOID = {"meta", "link", "img", "path", "use", "rect"}


class Page(HTMLParser):
    """Tags that are open, text by tag, and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return Detector.load(tiny.tiny_bundle(tmp_path_factory.mktemp("bundle")), device="cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Normal images, and outliers: bright ones, and some under a hostile name."""
    folder = tmp_path_factory.mktemp("sets")
    for name, images in (
        ("normal", tiny.draw(300, seed=50)),
        ("bright", tiny.draw(60, seed=51) // 2 + 128),
        ("near", tiny.draw(40, seed=52) + 5),
    ):
        np.save(folder / f"{name}.npy", images)
    return {name: open_source(folder / f"{name}.npy") for name in ("normal", "bright", "near")}


@pytest.fixture(scope="module")
def result(detector, sources):
    sets = {"bright": sources["bright"], HOSTILE: sources["near"]}
    return evaluate(detector, sources["normal"], sets, alpha=0.03)


@pytest.fixture(scope="module")
def page(result, detector):
    return html(result, detector)


def pictures(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [decode(base64.b64decode(data), 3) for data in found]


def test_every_number_of_the_evaluation_stands_in_it(page, result):
    """Alphas per thousand parts, catches, every score, batches: as `evaluate` found them."""
    text = " ".join(Page(page).texts)
    for level in result.levels:
        assert f" {1000 * level.observed:.1f} " in text
        for found in level.recall.values():
            assert f"{100 * found.value:.1f} %" in text
    for found in result.outliers.values():
        for separation in found.scores.values():
            assert f"{separation.auroc:.4f}" in text
        assert f"{found.verdict.aupr:.4f}" in text
        assert f"{found.discoveries.mean_fdp:.4f}" in text
    for name in result.normal.scores:
        assert name in text
    assert f"{result.bits_per_dim:.4f}" in text
    assert "if live normal images are exchangeable with the calibration images" in text
    assert "Which outliers are caught" in text


def test_it_stands_alone(page):
    """No script, and nothing that is fetched: pictures are data, references point within."""
    read = Page(page)
    assert read.open == ["html"] or read.open == []
    assert "script" not in read.tags
    for key, value in read.attributes:
        assert not key.startswith("on")
        if key in ("src", "href", "xlink:href"):
            assert value.startswith(("data:", "#")), value
    assert "url(http" not in page
    assert "@import" not in page


def test_names_are_text_and_nothing_else(page):
    """Mark-up, formulas and letters that no font here has."""
    read = Page(page)
    assert HOSTILE in "".join(read.texts)
    assert "<script>" not in page


def test_thumbnails_are_the_extremes_beside_their_maps(page, result, sources):
    """The strangest normal image first: its pixels on the left, its map on the right."""
    shown = pictures(page)
    assert len(shown) == 3 * SHOWN
    strangest = list(sources["normal"])[result.normal.extremes[0].index].payload
    times = shown[0].shape[0] // 4
    assert shown[0].shape == (4 * times, 8 * times, 3)
    np.testing.assert_array_equal(shown[0][::times, : 4 * times : times, :1], strangest)


def test_without_thumbnails_no_pixel_leaves(result, detector):
    """Names alone, for images that may not travel."""
    page = html(result, detector, thumbnails=False)
    assert "<img" not in page
    assert "base64" not in page
    assert "normal.npy#" in page


def test_a_bundle_without_maps_shows_images_alone(result, detector, monkeypatch):
    """Nothing beside them, and nothing said about maps."""
    monkeypatch.setattr(detector.session, "outputs", ["log_likelihood", "statistics"])
    page = html(result, detector)
    assert {picture.shape for picture in pictures(page)} == {(4, 4, 3)}
    assert "Beside each its map" not in page


def test_normal_images_alone_are_worth_a_page(detector, sources):
    """No outliers: alphas, scores and p-values remain."""
    page = html(evaluate(detector, sources["normal"], {}), detector)
    assert Page(page).open in (["html"], [])
    assert "Are p-values what they promise" in page
    assert "Caught against" not in page
    assert len(pictures(page)) == SHOWN


def test_what_was_left_out_is_counted(detector, tmp_path):
    """Images seen in training, and what could not be read."""
    images = np.concatenate([tiny.draw(200, seed=64), tiny.draw(1, seed=1)])
    np.save(tmp_path / "x.npy", images)
    (tmp_path / "y.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = html(evaluate(detector, open_source(tmp_path), {}), detector)
    said = "Left out: seen in training or calibration: 1 of normal; could not be read: 1."
    assert said in page


def test_the_same_evaluation_gives_the_same_page(page, result, detector):
    """Byte for byte, figures too."""
    assert html(result, detector) == page


def test_what_masks_mark_is_outlined(detector, tmp_path):
    """A frame around the marked pixels, in a colour that no image here has."""
    for folder in ("train/good", "test/good", "test/dent", "ground_truth/dent"):
        (tmp_path / folder).mkdir(parents=True)
    for i, pixels in enumerate(tiny.draw(10, seed=92)):
        Image.fromarray(pixels[..., 0]).save(tmp_path / f"test/good/{i}.png")
        mask = np.zeros((4, 4), np.uint8)
        mask[1, 1] = 255
        Image.fromarray(pixels[..., 0] | mask).save(tmp_path / f"test/dent/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"ground_truth/dent/{i}_mask.png")
    given = open_evaluation(tmp_path)
    found = evaluate(detector, given.normal, given.outliers, masks=given.masks)
    page = html(found, detector, masks=given.masks)
    dents = pictures(page)[SHOWN:]
    assert len(dents) == SHOWN
    for picture in dents:
        times = picture.shape[0] // 4
        framed = (picture[::times, : 4 * times : times] == OUTLINE).all(axis=2)
        expected = np.zeros((4, 4), bool)
        expected[[0, 1, 1, 2], [1, 0, 2, 1]] = True
        np.testing.assert_array_equal(framed, expected)
    assert f"{found.localisation.aupro:.4f}" in page


def test_large_images_are_shown_small():
    """No side of a picture is above 256 pixels, whatever the image's size."""
    from anomalyd.detect.report import _picture

    pixels = np.zeros((700, 1400, 3), np.uint8)
    pixels[:, 700:] = 255
    picture = decode(_picture(pixels, np.ones((700, 1400), np.float32), None), 3)
    assert picture.shape == (128, 512, 3)
    assert picture[:, :120].max() == 0
    assert picture[:, 136:256].min() == 255


def test_many_sets_and_infinite_scores_are_drawn(detector, sources):
    """More sets than colours; a statistic that is no number everywhere."""
    sets = {f"set {i}": sources["near"] for i in range(30)}
    found = evaluate(detector, sources["normal"], sets)
    found.normal.scores["max_pixel_nll"][:5] = np.finfo(float).max
    found.outliers["set 0"].sample.scores["max_pixel_nll"][:] = -np.finfo(float).max
    drawn = plots.roc_plot(found)
    assert all(f"set {i} (" in drawn for i in range(30))
    assert "max_pixel_nll" in plots.small_histograms(found)


def test_the_file_appears_whole_or_not_at_all(result, detector, tmp_path, monkeypatch):
    """Written beside and renamed; a place that cannot be is told before anything is scored."""
    write_report(tmp_path / "x.html", result, detector)
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]
    with pytest.raises(UsageError, match=r"--report .*\.html"):
        check_report(tmp_path / "x.pdf")
    with pytest.raises(AnomalydError, match="there is no folder"):
        check_report(tmp_path / "none" / "x.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match="a folder is there"):
        check_report(tmp_path / "folder.html")
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        with pytest.raises(AnomalydError, match="its folder cannot be written to"):
            check_report(tmp_path / "x.html")
    with pytest.raises(AnomalydError, match="cannot be written"):
        write_report(tmp_path / "folder.html", result, detector)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "x.html"]


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    """Before anything is scored."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"anomalyd\[evaluate\]"):
        check_report(tmp_path / "x.html")
