"""Photographs in tiles: complete, bounded, the same whatever stands beside them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from anomalyd import Detector
from anomalyd.detect import tiling
from anomalyd.detect.runtime import Raw, Session
from anomalyd.detect.tiling import Canvas, corners, shrunk, starts
from anomalyd.errors import UsageError, WrongSize
from anomalyd.images import ImageSpec, to_pixels

SPEC = ImageSpec(4, 4, 1, on_mismatch="tile")
sides = st.integers(1, 40)


@pytest.fixture(scope="module")
def session():
    return Session(tiny.tiny_tiled_model().SerializeToString(), device="cpu", batch=4)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return Detector.load(tiny.tiny_tiled(tmp_path_factory.mktemp("bundle")), device="cpu")


@given(tile=sides, more=st.integers(0, 300))
def test_tiles_cover_a_side_and_stay_inside(tile, more):
    """From 0 to flush with the end, at most half a tile apart, none twice."""
    places = starts(tile + more, tile)
    assert places[0] == 0
    assert places[-1] == more
    steps = np.diff(places)
    assert (steps >= 1).all()
    assert (steps <= max(1, tile // 2)).all()


@given(height=sides, width=sides, down=st.integers(0, 60), across=st.integers(0, 60))
def test_a_constant_comes_back_from_its_tiles(height, width, down, across):
    """Every pixel is covered, and the weights of the tiles on it are divided out."""
    spec = ImageSpec(height, width, 1, on_mismatch="tile")
    places = corners(height + down, width + across, spec)
    canvas = Canvas(height + down, width + across, spec)
    canvas.add(places, np.full((len(places), height, width), 3.5, np.float32))
    np.testing.assert_allclose(canvas.finished(), 3.5, rtol=1e-5)


def test_a_pixel_is_told_by_the_tile_that_knows_most_before_it():
    """Where a tile begins another one is half through, and that one's word counts."""
    spec = ImageSpec(16, 16, 1, on_mismatch="tile")
    canvas = Canvas(32, 16, spec)
    canvas.add(np.array([[0, 0]]), np.zeros((1, 16, 16), np.float32))
    canvas.add(np.array([[8, 0]]), np.ones((1, 16, 16), np.float32))
    canvas.add(np.array([[16, 0]]), np.zeros((1, 16, 16), np.float32))
    assert (canvas.finished()[8:9] < 0.05).all()
    assert (canvas.finished()[16:17] > 0.95).all()


def test_maps_are_those_of_the_whole_photograph(session):
    """Where pixels are independent, a map put together from tiles is exactly the map."""
    for image in tiny.photographs(5):
        _, maps, small = tiling.read(session, SPEC, image, maps=tiling.MAPS)
        assert small is image
        np.testing.assert_allclose(maps["nll_map"], tiny.NLL[image[..., 0]], rtol=1e-5)


def test_a_photograph_is_scored_alike_in_any_company(detector):
    """Alone, in a list and in another order: the same row."""
    images = tiny.photographs(6, seed=5)
    together = detector.run(images)
    backwards = detector.run(images[::-1])
    for i, image in enumerate(images):
        alone = detector.run([image])
        assert alone.texture[0] == together.texture[i] == backwards.texture[-1 - i]
        assert alone.log_likelihood[0] == together.log_likelihood[i]
        assert alone.tiles[0] == together.tiles[i] == len(corners(*image.shape[:2], SPEC))


def test_rows_of_photographs_are_chosen_and_joined(detector):
    """Slices, masks and concatenation keep every photograph's map beside its scores."""
    images = tiny.photographs(5, seed=6)
    raw = detector.run(images, nll_map=True)
    picked = raw[np.array([True, False, False, True, False])]
    again = Raw.concat([picked, raw[1:2]])
    assert [m.shape for m in again.nll_map] == [images[i].shape[:2] for i in (0, 3, 1)]
    assert again.texture.tolist() == raw.texture[[0, 3, 1]].tolist()
    assert again.tiles.tolist() == raw.tiles[[0, 3, 1]].tolist()


def test_no_more_than_a_few_tiles_are_held(session, monkeypatch):
    """However large the photograph, a run of the graph gets a bounded number of tiles."""
    sizes = []
    run = session.run

    def noting(images, **asked):
        sizes.append(len(images))
        return run(images, **asked)

    monkeypatch.setattr(session, "run", noting)
    raw, _, _ = tiling.read(session, SPEC, np.zeros((100, 90, 1), np.uint8), maps=tiling.MAPS)
    assert sum(sizes) == raw.tiles[0] > 2_000
    assert max(sizes) <= tiling.TILES * session.batch


def test_flips_average_the_map_and_leave_the_score(detector):
    """A photograph that is its own mirror image gets a map that is, too."""
    quarter = tiny.photographs(1, seed=7, least=20)[0]
    half = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
    image = np.concatenate([half, half[::-1]])
    plain = detector.run([image], nll_map=True)
    raw = tiling.run(
        detector.session, SPEC, [image], texture=detector.texture, nll_map=True, flips=True
    )
    mirrored = raw.nll_map[0]
    np.testing.assert_allclose(mirrored, mirrored[::-1, ::-1], atol=1e-4)
    np.testing.assert_allclose(mirrored, mirrored[:, ::-1], atol=1e-4)
    assert np.abs(plain.nll_map[0] - plain.nll_map[0][::-1]).max() > 0.1
    assert raw.texture[0] == plain.texture[0]


def test_flips_average_the_map_of_a_small_image_too(tmp_path):
    """What is no photograph is turned as a whole."""
    detector = Detector.load(tiny.tiny_bundle(tmp_path), device="cpu")
    images = tiny.draw(3, seed=9)

    def maps(images, **options):
        return tiling.run(detector.session, detector.spec, images, nll_map=True, **options).nll_map

    turned = [
        maps(images[:, ::down, ::right])[:, ::down, ::right]
        for down in (1, -1)
        for right in (1, -1)
    ]
    np.testing.assert_allclose(maps(images, flips=True), np.mean(turned, axis=0), atol=1e-5)


def test_scaling_down_takes_means_and_maps_come_back_at_full_size(tmp_path):
    """Boxes are averaged, a rest gives a narrower box, and the map has the photograph's size."""
    image = np.arange(7 * 10, dtype=np.uint8).reshape(7, 10, 1)
    small = shrunk(image, 2)
    assert small.shape == (4, 5, 1)
    assert small[0, 0, 0] == round(image[:2, :2].mean())
    assert small[3, 0, 0] == 61  # half of 60 and 61, up
    detector = Detector.load(tiny.tiny_tiled(tmp_path, shrink=3), device="cpu")
    image = tiny.photographs(1, seed=8, least=31)[0][:31, :29]
    raw = detector.run([image], nll_map=True)
    assert raw.nll_map[0].shape == (31, 29)
    assert raw.tiles[0] == len(corners(11, 10, SPEC))


def test_an_image_smaller_than_a_tile_is_refused(detector):
    """In either side, in one line that names both sizes; a tile's own size is enough."""
    with pytest.raises(WrongSize, match=r"image is 30x3; the model reads tiles of 4x4") as caught:
        detector.score(np.zeros((3, 30), np.uint8))
    tiny.check_line(caught.value)
    with pytest.raises(WrongSize, match="tiles of 12x12"):
        to_pixels(np.zeros((11, 30), np.uint8), dataclasses.replace(SPEC, shrink=3))
    assert detector.score(np.zeros((4, 4), np.uint8)).likelihood == "exact"


@pytest.mark.parametrize("shrink", [0, 2])
def test_only_tiles_are_scaled_down_by_a_factor(shrink):
    """A factor without tiles, or below 1, is a usage error."""
    with pytest.raises(UsageError, match="shrink"):
        ImageSpec(4, 4, 1, shrink=shrink)


def test_a_photograph_beyond_the_calibrated_sizes_is_counted(detector):
    """Fewer or more tiles than any calibration photograph has."""
    known = detector.calibration.tiles
    sizes = (4, 4), (20, 20), (300, 60)
    raw = detector.run([np.zeros((*size, 1), np.uint8) for size in sizes])
    assert (raw.tiles < known[0]).sum() + (raw.tiles > known[-1]).sum() >= 1
    assert detector.unfamiliar(raw) == int(
        ((raw.tiles < known[0]) | (raw.tiles > known[-1])).sum()
    )
