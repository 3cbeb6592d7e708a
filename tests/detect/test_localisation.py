"""Pixel measures against sklearn, scipy and a slow reading of their definitions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from anomalyd.detect.localisation import PixelCounts, regions
from anomalyd.errors import UsageError

CORNERS = np.ones((3, 3))
masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))


def counted(maps, marks):
    counts = PixelCounts()
    for values, mask in zip(maps, marks, strict=True):
        counts.add(values, mask)
    return counts


def images(seed, sizes=((12, 9), (7, 20), (5, 5)), decimals=None):
    """Maps and masks of several sizes, the map a little higher where the mask is."""
    rng = np.random.default_rng(seed)
    marks = [rng.random(size) < 0.2 for size in sizes]
    maps = [rng.normal(size=mask.shape) + mask for mask in marks]
    if decimals is not None:
        maps = [np.round(values, decimals) for values in maps]
    return maps, marks


def slow_aupro(maps, marks, limit):
    """Threshold by threshold: the mean overlap against the rate of false positives."""
    labelled = [ndimage.label(mask, CORNERS) for mask in marks]
    outside = np.concatenate([values[~mask] for values, mask in zip(maps, marks, strict=True)])
    curve = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([values.ravel() for values in maps]))[::-1]:
        found = [
            np.mean(values[labels == number] >= threshold)
            for values, (labels, count) in zip(maps, labelled, strict=True)
            for number in range(1, count + 1)
        ]
        curve.append((np.mean(outside >= threshold), np.mean(found)))
    x, y = np.array(curve).T
    grid = np.linspace(0, limit, 200_001)
    return np.trapezoid(np.interp(grid, x, y), grid) / limit


@given(masks)
def test_regions_are_scipys_components(mask):
    """The same partition as an 8-connected labelling, numbered from 1 without gaps."""
    found, (expected, count) = regions(mask), ndimage.label(mask, CORNERS)
    assert (found == 0).tolist() == (~mask).tolist()
    pairs = set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True)) - {(0, 0)}
    assert len(pairs) == count == found.max(initial=0)


def test_regions_of_a_spiral_and_of_the_edges():
    """One winding line is one region; the ends of two rows do not touch each other."""
    spiral = np.array([list("#####"), list("....#"), list("###.#"), list("#...#"), list("#####")])
    assert regions(spiral == "#").max() == 1
    rows = np.array([[False, False, True], [True, False, False]])
    assert regions(rows).max() == 2


def test_regions_of_a_large_mask():
    """A million pixels of noise and blobs, as scipy labels them."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(1000, 1000)), 3) > 0
    assert regions(noise).max() == ndimage.label(noise, CORNERS)[1]


@pytest.mark.parametrize("seed", range(5))
def test_pixel_auroc_is_sklearns(seed):
    """Over all pixels of all images, ties half."""
    maps, marks = images(seed, decimals=1)
    flat = [np.concatenate([each.ravel() for each in group]) for group in (marks, maps)]
    assert counted(maps, marks).pixel_auroc() == pytest.approx(roc_auc_score(*flat), abs=1e-12)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_aupro_follows_its_definition(seed, limit):
    """Ties, images of several sizes, regions of one pixel."""
    maps, marks = images(seed, decimals=1)
    expected = slow_aupro(maps, marks, limit)
    assert counted(maps, marks).aupro(limit) == pytest.approx(expected, abs=2e-4)


def test_levels_cost_little():
    """18 bits a value move either measure by less than a thousandth."""
    maps, marks = images(3, sizes=((25, 40),))
    counts = counted(maps, marks)
    assert counts.pixel_auroc() == pytest.approx(
        roc_auc_score(marks[0].ravel(), maps[0].ravel()), abs=1e-3
    )
    assert counts.aupro() == pytest.approx(slow_aupro(maps, marks, 0.3), abs=1e-3)


def test_aupro_weighs_regions_and_auroc_pixels():
    """A large region found and a small one missed: half the regions, most of the pixels."""
    mask = np.zeros((20, 20), bool)
    mask[:8, :8] = mask[15, 15] = True
    found = np.zeros((20, 20))
    found[:8, :8] = 1.0
    found[15, 15] = -1.0
    counts = counted([found], [mask])
    assert counts.aupro() == pytest.approx(0.5)
    assert counts.pixel_auroc() == pytest.approx(64 / 65)


def test_perfect_and_useless_maps():
    """1 where every marked pixel lies above the rest; limit / 2 where all values tie."""
    mask = np.zeros((10, 10), bool)
    mask[2:5, 2:5] = True
    perfect, flat = counted([mask.astype(float)], [mask]), counted([np.ones((10, 10))], [mask])
    assert perfect.pixel_auroc() == perfect.aupro() == 1.0
    assert flat.pixel_auroc() == 0.5
    assert flat.aupro() == pytest.approx(0.15)


def test_normal_images_bring_false_positives_alone():
    """A normal image as strange as the defect halves what the map is worth."""
    mask = np.zeros((10, 10), bool)
    mask[2:5, 2:5] = True
    strange, normal = counted([mask.astype(float)], [mask]), PixelCounts()
    normal.add(np.ones((10, 10)))
    both = strange + normal
    assert both.unmarked.sum() == 91 + 100
    assert both.pixel_auroc() == pytest.approx((91 + 100 / 2) / 191)
    assert strange.pixel_auroc() == 1.0


def test_levels_keep_the_order_of_all_numbers():
    """Negative, tiny and huge values, infinities; NaN counts as strangest."""
    ordered = [-np.inf, -1e30, -3, -2.9, -1e-30, 0, 1e-30, 2, 2.1, 1e30, 1e300]
    for low, high in pairwise(ordered):
        counts = counted([np.array([[low, high]])], [np.array([[False, True]])])
        assert counts.pixel_auroc() == 1.0, (low, high)
    assert counted([np.array([[9.0, np.nan]])], [np.array([[False, True]])]).pixel_auroc() == 1
    assert counted([np.array([[0.0, -0.0]])], [np.array([[False, True]])]).pixel_auroc() == 0.5


def test_masks_that_mark_nothing_or_do_not_fit_are_told():
    """There is no rate without pixels on both sides."""
    with pytest.raises(UsageError, match="mark none"):
        counted([np.ones((3, 3))], [np.zeros((3, 3), bool)]).pixel_auroc()
    with pytest.raises(UsageError, match="mark all"):
        counted([np.ones((3, 3))], [np.ones((3, 3), bool)]).aupro()
    with pytest.raises(UsageError, match=r"shape \(3, 3\), not \(2, 3\)"):
        PixelCounts().add(np.ones((3, 3)), np.ones((2, 3), bool))
