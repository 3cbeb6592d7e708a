"""Splits: disjoint by content and by group, big enough for alpha, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalyd.errors import TrainingError
from anomalyd.train.splits import Splits, near_duplicates, split


def hashes(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint64) * 7919


def parts(splits: Splits) -> list[set[int]]:
    kept = [splits.train, splits.validation, splits.calibration]
    if splits.fit is not splits.validation:
        kept.append(splits.fit)
    return [set(rows.tolist()) for rows in kept]


@given(
    content=st.lists(st.integers(0, 60), min_size=40, max_size=200),
    seed=st.integers(0, 5),
    joined=st.integers(1, 9),
)
def test_equal_images_and_equal_groups_never_straddle_splits(content, seed, joined):
    """Every row is in one split, and so are its copies and its group."""
    groups = [None if value % 3 == 0 else str(value // joined) for value in content]
    try:
        splits = split(np.array(content, np.uint64), groups, seed=seed)
    except TrainingError:
        return  # too few independent images: told, not split

    sets = parts(splits)
    assert sorted(row for rows in sets for row in rows) == list(range(len(content)))
    for keys in (content, groups):
        homes: dict[object, set[int]] = {}
        for place, rows in enumerate(sets):
            for row in rows:
                if keys[row] is not None:
                    homes.setdefault(keys[row], set()).add(place)
        assert all(len(places) == 1 for places in homes.values())


def test_large_data_is_split_80_5_5_10():
    """60,000 images: 48,000 train, 3,000 validation, 3,000 fit, 6,000 calibration."""
    splits = split(hashes(60_000), [None] * 60_000)

    sizes = [len(getattr(splits, name)) for name in ("train", "validation", "fit", "calibration")]
    assert sizes == [48_000, 3_000, 3_000, 6_000]


def test_little_data_still_calibrates_for_one_per_cent():
    """300 images keep 99 for calibration, and validation doubles as the fit split."""
    splits = split(hashes(300), [None] * 300)

    assert len(splits.calibration) == 99
    assert splits.fit is splits.validation


def test_assignment_depends_on_the_seed_alone():
    """The same seed gives the same splits, another seed others."""
    first, again, other = (split(hashes(500), [None] * 500, seed=s) for s in (1, 1, 2))

    assert np.array_equal(first.calibration, again.calibration)
    assert not np.array_equal(first.calibration, other.calibration)


def test_one_group_is_refused_with_a_way_out():
    """If every image is in one group there is nothing to hold out."""
    with pytest.raises(TrainingError, match="--group"):
        split(hashes(100), ["tile"] * 100)


@pytest.mark.parametrize("seed", range(20))
def test_a_group_that_is_most_of_the_data_trains(seed):
    """A group of 600 among 1,000 images is in no held-out split, whatever the seed."""
    groups = ["large"] * 600 + [f"small-{row // 5}" for row in range(400)]
    splits = split(hashes(1_000), groups, seed=seed)

    assert set(range(600)) <= set(splits.train.tolist())
    assert len(splits.validation) == len(splits.calibration) == 100


def test_near_duplicates_are_counted():
    """A held-out image that differs by one grey level from a training image is noticed."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (200, 12, 12, 1), dtype=np.uint8)
    splits = split(hashes(200), [None] * 200)
    clean = near_duplicates(pixels, splits)
    copy = pixels[splits.train[0]].copy()
    copy[0, 0, 0] ^= 1
    pixels[splits.calibration[0]] = copy

    assert (clean, near_duplicates(pixels, splits)) == (0, 1)
