"""From items to raw scores: in order, complete, bounded."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tiny
from PIL import Image

from anomalyd.detect.heatmap import heatmap_png
from anomalyd.detect.pipeline import AHEAD, LARGEST_SLAB, collect, scored
from anomalyd.detect.runtime import Session
from anomalyd.errors import CorruptImage, SourceError
from anomalyd.images import ImageSpec, content_hash, decode
from anomalyd.sources import Item, open_paths, open_source

SPEC = ImageSpec(4, 4, 1)


@pytest.fixture(scope="module")
def session():
    return Session(tiny.tiny_model().SerializeToString(), device="cpu", batch=4)


def items_of(images):
    return (Item("x.npy", i, image) for i, image in enumerate(images))


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 13, 200])
def test_every_item_comes_back_once_and_in_order(session, n):
    """Slabs cover the items without gap, each row beside its own image."""
    images = tiny.draw(n, seed=1)
    slabs = list(scored(session, SPEC, items_of(images), hashes=True))
    assert [item.index for slab in slabs for item in slab.items] == list(range(n))
    for slab in slabs:
        expected = tiny.nll(images[[slab.items[place].index for place in slab.readable]])
        np.testing.assert_allclose(-slab.raw.log_likelihood[:, 0], expected, rtol=1e-6)
        assert slab.hashes.tolist() == [content_hash(image) for image in slab.pixels]


def test_bad_items_are_named_and_nothing_else_is_lost(session, tmp_path):
    """Broken, empty, already failed: each keeps its place with its error."""
    good = tmp_path / "good.png"
    Image.fromarray(tiny.draw(1)[0, ..., 0]).save(good)
    failed = CorruptImage("page 3 is missing")
    payloads = [good, good.read_bytes()[:40], b""]
    items = [Item("x", i, payload) for i, payload in enumerate(payloads)]
    items.insert(2, Item("x", 9, b"", error=failed))
    (slab,) = scored(session, SPEC, items)
    assert slab.readable.tolist() == [0]
    assert list(slab.errors) == [1, 2, 3]
    assert slab.errors[2] is failed


def test_a_slab_without_any_image_has_no_raw_scores(session):
    """Nothing readable: the graph is not run."""
    (slab,) = scored(session, SPEC, [Item("x", None, b"")])
    assert slab.raw is None
    assert collect(session, SPEC, [Item("x", None, b"")]) is None


def test_items_are_read_as_they_are_needed(session):
    """However long the source, no more than a few slabs are read ahead of the caller."""
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield Item("x", read, tiny.draw(1)[0])

    slabs = scored(session, SPEC, endless())
    seen = sum(len(next(slabs).items) for _ in range(6))
    assert read <= seen + AHEAD * LARGEST_SLAB * session.batch
    slabs.close()


def test_a_caller_that_leaves_stops_the_threads(session):
    """Closing the generator ends its threads, though work was waiting."""
    before = threading.active_count()
    slabs = scored(session, SPEC, items_of(tiny.draw(300)))
    next(slabs)
    slabs.close()
    assert threading.active_count() == before


def test_a_source_that_breaks_off_is_an_error(session):
    """A damaged container ends in its SourceError and leaves no thread behind."""

    def broken():
        yield from items_of(tiny.draw(10))
        raise SourceError("x.npy: the file is truncated")

    before = threading.active_count()
    with pytest.raises(SourceError, match="truncated"):
        list(scored(session, SPEC, broken()))
    assert threading.active_count() == before


def test_collect_keeps_hashes_names_and_groups(session):
    """Everything that calibration needs, and no image; rows can be chosen."""
    images = tiny.draw(30, seed=2)
    items = [Item("a", i, image, group=str(i % 3)) for i, image in enumerate(images)]
    items.insert(5, Item("b.png", None, b""))
    done = []
    collected = collect(session, SPEC, items, progress=done.append)
    assert len(collected) == 30
    assert sum(done) == 31
    assert [name for name, _ in collected.errors] == ["b.png"]
    odd = collected[np.arange(30) % 2 == 1]
    assert odd.names == [f"a#{i}" for i in range(1, 30, 2)]
    assert odd.groups == [str(i % 3) for i in range(1, 30, 2)]
    np.testing.assert_allclose(-odd.raw.log_likelihood[:, 0], tiny.nll(images[1::2]), rtol=1e-6)


def test_a_folder_of_real_images_and_its_idx_file_score_alike(session, fixture_data, tmp_path):
    """PNG files and arrays take one path; 28x28 images are scaled down to the model's 4x4."""
    items = list(open_source(fixture_data / "mnist", split="test"))
    for i, item in enumerate(items):
        Image.fromarray(item.payload.reshape(28, 28)).save(tmp_path / f"{i:03d}.png")
    arrays = collect(session, SPEC, items)
    files = collect(session, SPEC, open_paths([tmp_path]))
    assert len(arrays) == len(files) == 200
    np.testing.assert_array_equal(files.hashes, arrays.hashes)
    np.testing.assert_array_equal(files.raw.log_likelihood, arrays.raw.log_likelihood)
    assert arrays.raw.log_likelihood.std() > 0


def test_heatmap_shows_the_image_beside_its_map():
    """A PNG of both, enlarged by a whole number; the brightest pixel is the most surprising."""
    pixels = np.zeros((4, 4, 1), np.uint8)
    nll_map = np.ones((4, 4), np.float32)
    nll_map[1, 2] = 9
    picture = decode(heatmap_png(pixels, nll_map), 3)
    times = picture.shape[0] // 4
    assert picture.shape == (4 * times, 8 * times, 3)
    grid = picture[::times, ::times].astype(int)
    assert grid[:, :4].sum() == 0
    assert np.unravel_index(grid[:, 4:].sum(axis=2).argmax(), (4, 4)) == (1, 2)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_heatmap_of_a_flat_or_broken_map(value):
    """A map without contrast, or without numbers, is still a picture."""
    rgb = np.full((4, 4, 3), 7, np.uint8)
    picture = decode(heatmap_png(rgb, np.full((4, 4), value, np.float32)), 3)
    assert (picture[0, 0] == 7).all()


def test_a_large_image_lies_under_its_map():
    """From 224 pixels on the picture has the image's size, is the image where the map is quiet."""
    pixels = np.full((300, 230, 1), 90, np.uint8)
    nll_map = np.zeros((300, 230), np.float32)
    nll_map[270:280, 100:110] = 5
    picture = decode(heatmap_png(pixels, nll_map), 3)
    assert picture.shape == (300, 230, 3)
    strange = np.zeros((300, 230), bool)
    strange[270:280, 100:110] = True
    assert (picture[~strange] == 90).all()
    assert (picture[strange] == picture[275, 105]).all()
    assert picture[275, 105, 0] > 200
