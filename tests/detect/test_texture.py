"""What is usual around a pixel, on surfaces drawn here."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny

from anomalyd.detect import grain
from anomalyd.detect import texture as module
from anomalyd.detect.npz import pack_arrays
from anomalyd.detect.texture import Field, Texture
from anomalyd.errors import BundleError


def surface(height, width, seed):
    """Smoothed noise under a light that falls off to the left border, and what a density says."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 10, (height + 2, width + 2))
    smooth = sum(noise[i : i + height, j : j + width] for i in range(3) for j in range(3)) / 3
    grey = np.clip(120 + smooth - 60 * np.exp(-np.arange(width) / 6), 0, 255)
    return field(grey, rng)


def field(grey, rng):
    nll, excess = rng.gamma(4, 1, grey.shape), rng.normal(0, 1, grey.shape)
    parts = (part.astype(np.float32) for part in (grey, nll, excess))
    return Field(*parts, grain.read(grey.astype(np.uint8)[..., None]))


def brushed(height, width, seed, at=None):
    """A surface with streaks down its columns; from the line `at` on they are others."""
    rng = np.random.default_rng(seed)
    grey = surface(height, width, seed).grey
    for lines in (slice(0, at), slice(at or height, height)):
        grey[lines] += rng.normal(0, 8, width)
    return field(np.clip(grey, 0, 255), rng)


def with_dot(normal, y, x, radius=4):
    """The same surface with a dark dot."""
    rows, columns = np.ogrid[: normal.grey.shape[0], : normal.grey.shape[1]]
    dot = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return normal._replace(grey=np.where(dot, np.float32(70), normal.grey)), dot


@pytest.fixture(scope="module")
def texture():
    return Texture.fit([surface(60 + 7 * i, 90 - 5 * i, i) for i in range(8)])


def test_a_dot_is_found_where_it_is(texture):
    """A photograph with a dot scores above every normal one, and its map peaks at the dot."""
    normal = [texture.judge(surface(70, 70, seed))[0] for seed in range(100, 130)]
    strange, dot = with_dot(surface(70, 70, 99), 40, 30)
    score, surprise = texture.judge(strange)
    assert score > max(normal)
    assert dot[np.unravel_index(surprise.argmax(), surprise.shape)]


def test_the_score_of_a_normal_photograph_does_not_grow_with_its_size():
    """A hundred times the pixels hold rarer ones, as rare as so many must, and score the same."""
    rng = np.random.default_rng(0)
    small, large = (rng.exponential(size=(200, n)).astype(np.float32) for n in (300, 30_000))
    rarest = [np.median(some.max(axis=1)) for some in (small, large)]
    scores = [np.median([module._log_mean_exp(u) for u in some]) for some in (small, large)]
    assert rarest[1] > rarest[0] + 4
    assert abs(scores[1] - scores[0] - np.log(np.log(30_000) / np.log(300))) < 0.3


def test_surprise_is_the_share_of_normal_pixels(texture):
    """On new normal photographs a share exp(-u) of the pixels is more surprising than u."""
    surprise = np.concatenate(
        [texture.judge(surface(80, 80, s))[1].ravel() for s in range(40, 60)]
    )
    for u in (0.5, 1, 2, 3):
        assert np.mean(surprise > u) == pytest.approx(np.exp(-u), rel=0.25)


def test_bands_of_rows_give_what_the_whole_gives(texture, monkeypatch):
    """A large photograph is read a few rows at a time, and nobody can tell."""
    photograph = surface(90, 40, 7)
    _, whole = texture.judge(photograph)
    monkeypatch.setattr(module, "BAND", 40 * 11)
    np.testing.assert_allclose(texture.judge(photograph)[1], whole, atol=1e-3)


def test_a_photograph_smaller_than_the_windows_has_a_map(texture):
    """Windows reach over the border, where the image is mirrored."""
    _, surprise = texture.judge(surface(5, 4, 3))
    assert surprise.shape == (5, 4)
    assert np.isfinite(surprise).all()


def test_a_flat_photograph_neither_fails_nor_passes(texture):
    """One grey without any noise is far from every normal texture."""
    parts = (np.full((60, 60), value, np.float32) for value in (120, 0, 0))
    blank = Field(*parts, grain.read(np.full((60, 60, 1), 120, np.uint8)))
    assert texture.judge(surface(60, 60, 1))[0] + 2 < texture.judge(blank)[0] < np.inf


def test_both_parts_of_a_score_weigh_alike():
    """Each in interquartile ranges from the median of the photographs that it was fitted to."""
    normal = [brushed(60 + 7 * i, 90 - 5 * i, i) for i in range(9)]
    texture = Texture.fit(normal)
    parts = [texture._parts(photograph, texture._surprise(photograph)) for photograph in normal]
    low, median, high = np.quantile(
        (parts - texture.usual[0]) / texture.usual[1], (1 / 4, 1 / 2, 3 / 4), axis=0
    )
    np.testing.assert_allclose(median, 0, atol=1e-9)
    np.testing.assert_allclose(high - low, 1)
    scores = [texture.judge(photograph)[0] for photograph in normal]
    np.testing.assert_allclose(scores, ((parts - texture.usual[0]) / texture.usual[1]).sum(axis=1))


def test_a_surface_without_grain_is_judged_by_its_texture_alone(texture):
    """Whatever its lines say."""
    assert texture.direction == grain.NO_GRAIN
    photograph = surface(70, 70, 5)
    score, surprise = texture.judge(photograph)
    other, same = texture.judge(photograph._replace(grain=brushed(70, 70, 5, 20).grain))
    assert score == other
    np.testing.assert_array_equal(surprise, same)


def test_a_surface_that_was_brushed_twice_is_found_and_so_is_where():
    """Only the streaks of its first lines are others; these are the brightest of the map."""
    texture = Texture.fit([brushed(60 + 7 * i, 90 - 5 * i, i) for i in range(8)])
    assert texture.direction == 0
    normal = [texture.judge(brushed(80, 80, seed))[0] for seed in range(100, 130)]
    score, surprise = texture.judge(brushed(80, 80, 99, at=25))
    assert score > max(normal)
    assert np.median(surprise[:22]) > np.quantile(surprise[28:], 0.9)


def test_a_texture_survives_its_file(texture):
    """The bytes are always the same and give the same numbers back."""
    data = texture.pack()
    again = Texture.unpack(data)
    assert again.pack() == data
    photograph = surface(50, 50, 2)
    score, surprise = again.judge(photograph)
    assert score == texture.judge(photograph)[0]
    assert (surprise == texture.judge(photograph)[1]).all()


def test_a_texture_from_before_there_was_grain_is_read(texture):
    """Its score is that of the neighbourhoods of pixels, as it was when it was calibrated."""
    older = ("line", "spread", "mean", "whiten", "quantiles")
    read = Texture.unpack(pack_arrays({key: getattr(texture, key) for key in older}))
    score, surprise = read.judge(brushed(50, 50, 2, at=20))
    assert score == pytest.approx(module._log_mean_exp(surprise))
    with pytest.raises(BundleError, match="it must hold"):
        Texture.unpack(pack_arrays({key: getattr(texture, key) for key in (*older, "usual")}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mean", np.zeros(3), "shape"),
        ("spread", np.zeros(1), "positive"),
        ("quantiles", np.zeros((6, 57)) - np.arange(57), "rise"),
        ("lines", -np.arange(57.0), "rise"),
        ("direction", np.array([2]), "-1, 0 or 1, not 2"),
        ("usual", np.zeros((2, 2)), "positive"),
        ("whiten", np.full((72, 72), np.nan), "finite"),
    ],
)
def test_a_broken_texture_is_refused(texture, key, value, said):
    """In one line that names the file and the rule."""
    broken = dataclasses.replace(texture, **{key: value})
    with pytest.raises(BundleError, match=rf"texture.npz: .*{said}") as caught:
        Texture.unpack(broken.pack())
    tiny.check_line(caught.value)
    with pytest.raises(BundleError, match=r"texture\.npz"):
        Texture.unpack(pack_arrays({"mean": np.zeros(1)}))
