"""Streaks that run from end to end, and lines that do not follow them, on surfaces drawn here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalyd.detect import grain

NOTHING = np.log(grain.FLOOR)


def ground(height, width, seed, streaks=6.0):
    """Streaks down the columns, under noise and a light that falls off to the right."""
    rng = np.random.default_rng(seed)
    across = rng.normal(0, streaks, width) - np.linspace(0, 40, width)
    grey = 120 + across + rng.normal(0, 6, (height, width))
    return np.clip(grey.round(), 0, 255).astype(np.uint8)[..., None]


def ground_twice(height, width, seed, at):
    """The lines from `at` on have other streaks, as strong."""
    first, second = ground(height, width, seed), ground(height, width, seed + 1_000)
    return np.concatenate([first[:at], second[at:]])


@pytest.mark.parametrize("at", [20, 60])
def test_the_smaller_part_of_what_was_ground_twice_is_apart(at):
    """Whichever part is smaller, its lines are further from the usual one than all others."""
    along, _ = grain.read(ground_twice(80, 100, seed=1, at=at))
    smaller = np.arange(80) < at if at < 40 else np.arange(80) >= at
    border = abs(np.arange(80) - at) < grain.LINE
    assert along.apart[smaller & ~border].min() > along.apart[~smaller & ~border].max() + 1


def test_a_second_grinding_is_a_step():
    """Its step is beyond those of a hundred surfaces that were ground once."""
    once = [grain.read(ground(80, 100, seed))[0].step for seed in range(100)]
    twice = [grain.read(ground_twice(80, 100, seed, 30))[0].step for seed in range(100, 120)]
    assert min(twice) > max(once)


def test_brightness_that_changes_slowly_is_no_step():
    """A light that falls off across or along the grain leaves every line the usual one."""
    height, width = 80, 100
    flat = grain.read(ground(height, width, 5))[0]
    light = np.linspace(0.6, 1.4, height)[:, None, None] * np.linspace(1.2, 0.8, width)[:, None]
    lit = grain.read((ground(height, width, 5) * light).clip(0, 255).astype(np.uint8))[0]
    assert abs(lit.step - flat.step) < 0.3
    assert abs(lit.apart - flat.apart).mean() < 0.3


def test_the_direction_is_where_streaks_run():
    """Down, along the rows, or nowhere where noise is all there is."""
    down = [grain.read(ground(80, 100, seed)) for seed in range(5)]
    along = [grain.read(ground(80, 100, seed).transpose(1, 0, 2)) for seed in range(5)]
    noise = [grain.read(ground(80, 100, seed, streaks=0)) for seed in range(5)]
    directions = [grain.direction(readings) for readings in (down, along, noise)]
    assert directions == [0, 1, grain.NO_GRAIN]


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_turning_a_photograph_swaps_its_readings(height, width, channels, seed):
    """One value a line, none below that of the usual line, however small the photograph."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    along, across = grain.read(image)
    assert (len(along.apart), len(across.apart)) == (height, width)
    for reading in along, across:
        assert np.isfinite(reading.apart).all()
        assert min(reading.step, reading.apart.min()) >= NOTHING
        assert 0 <= reading.share <= 1
    turned = grain.read(image.transpose(1, 0, 2))
    for one, other in zip(turned, (across, along), strict=True):
        np.testing.assert_array_equal(one.apart, other.apart)
        assert one[1:] == other[1:]


def test_blocks_of_columns_give_what_the_whole_gives(monkeypatch):
    """A wide photograph is read a few columns at a time, and nobody can tell."""
    image = ground_twice(60, 90, 3, 25)
    whole = grain.read(image)[0]
    monkeypatch.setattr(grain, "BLOCK", 60 * 7)
    blocks = grain.read(image)[0]
    np.testing.assert_allclose(blocks.apart, whole.apart, atol=1e-5)
    assert blocks[1:] == pytest.approx(whole[1:], abs=1e-6)


@pytest.mark.parametrize("size", [(1, 50), (7, 50), (8, 50), (50, 1)])
def test_one_grey_has_no_unusual_lines(size):
    """Nor has what is too small to compare lines."""
    for reading in grain.read(np.full((*size, 1), 99, np.uint8)):
        assert reading.step == pytest.approx(NOTHING)
        np.testing.assert_allclose(reading.apart, NOTHING)
        assert reading.share == 0
