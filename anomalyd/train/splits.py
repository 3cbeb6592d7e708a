"""Train, validation, fit, calibration: who sees which image, disjoint by content and by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anomalyd.detect.conformal import images_needed
from anomalyd.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from anomalyd.train.data import Photographs

__all__ = ["Splits", "near_duplicates", "split"]

SHARES = {"validation": 0.05, "fit": 0.05, "calibration": 0.10}
"""What is taken from the training data; the rest trains the weights."""

LITTLE = 2_000
"""Below this many images, validation and fit are one split."""

WANTED_ALPHA = 0.01


@dataclass(frozen=True)
class Splits:
    """Row numbers, int64, sorted; `fit` is `validation` where there is little data.

    Attributes:
        train: fits the weights.
        validation: early stop.
        fit: the normal images that a score compares with.
        calibration: conformal ranks and nothing else.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    fit: NDArray[np.int64]
    calibration: NDArray[np.int64]


def split(hashes: NDArray[np.uint64], groups: Sequence[str | None], *, seed: int = 0) -> Splits:
    """Split rows 80 / 5 / 5 / 10, keeping equal images and equal groups together.

    The calibration split is enlarged to what alpha = 0.01 needs (99 images), to at most a third
    of the data.

    Args:
        hashes: (N,) content hashes.
        groups: N group names, None where an image is its own group.
        seed: seed of the assignment.

    Raises:
        TrainingError: too few independent images to fill the splits.
    """
    units = _units(hashes, groups)
    count, total = int(units.max()) + 1, len(units)
    if count < 8:
        raise TrainingError(
            f"training needs at least 8 independent images or groups, found {count} among {total} "
            "images; add images, or give a --group expression that joins fewer of them"
        )
    goals = {name: round(share * total) for name, share in SHARES.items()}
    goals["calibration"] = max(goals["calibration"], min(images_needed(WANTED_ALPHA), total // 3))
    if total < LITTLE:
        goals["validation"] += goals.pop("fit")
    sizes = np.bincount(units, minlength=count)
    order = np.random.default_rng(seed).permutation(count)
    # Units larger than a split should be come last, and train: one could be most of the data.
    order = order[np.argsort(sizes[order] > min(goals.values()), kind="stable")]
    owner = np.full(count, "train", dtype=object)
    position = 0
    for name, goal in goals.items():
        taken = 0
        # At least one unit each, and never the last ones: something must be left to train on.
        while taken < max(goal, 1) and position < count - 4:
            owner[order[position]] = name
            taken += int(sizes[order[position]])
            position += 1
    rows = {name: np.flatnonzero(owner[units] == name) for name in ("train", *goals)}
    empty = [name for name, members in rows.items() if not len(members)]
    if empty:
        raise TrainingError(
            f"no images are left for {', '.join(empty)}: {count} groups are too few or too "
            "uneven; give a --group expression that makes more of them"
        )
    return Splits(
        train=rows["train"],
        validation=rows["validation"],
        fit=rows.get("fit", rows["validation"]),
        calibration=rows["calibration"],
    )


def _units(hashes: NDArray[np.uint64], groups: Sequence[str | None]) -> NDArray[np.int64]:
    """Number the sets of rows that must stay together: joined by equal content or equal group."""
    _, units = np.unique(hashes, return_inverse=True)
    if all(group is None for group in groups):
        return units.astype(np.int64)
    parent = np.arange(len(hashes))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    for keys in (units.tolist(), groups):
        first: dict[object, int] = {}
        for row, key in enumerate(keys):
            if key is not None:
                parent[root(row)] = root(first.setdefault(key, row))
    roots = np.array([root(row) for row in range(len(hashes))])
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def near_duplicates(
    pixels: NDArray[np.uint8] | Photographs, splits: Splits, *, chunk: int = 4096
) -> int:
    """Count held-out images whose 8x8 thumbnail in 16 grey levels also occurs in training.

    A warning sign for --group, not a proof: thumbnails of unlike images can coincide.

    Args:
        pixels: (N, H, W, C), memory-mapped or not, or photographs.
        splits: row numbers.
        chunk: images read at a time; photographs are read one by one.
    """

    def read(rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        if isinstance(pixels, np.ndarray):
            yield from (
                pixels[rows[start : start + chunk]] for start in range(0, len(rows), chunk)
            )
        else:
            yield from (pixels[row][None] for row in rows.tolist())

    def thumbnails(rows: NDArray[np.int64]) -> set[bytes]:
        return {
            thumbnail.tobytes()
            for images in read(rows)
            for thumbnail in _thumbnail(images.mean(axis=3))
        }

    held_out = np.concatenate([splits.validation, splits.calibration])
    if splits.fit is not splits.validation:
        held_out = np.concatenate([held_out, splits.fit])
    return len(thumbnails(splits.train) & thumbnails(held_out))


def _thumbnail(images: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Area-average (N, H, W) to at most 8x8 and quantise to 16 levels."""
    for axis in (1, 2):
        side = images.shape[axis]
        starts = np.unique(np.linspace(0, side, min(8, side), endpoint=False).astype(int))
        widths = np.diff([*starts, side])
        shape = [1, 1, 1]
        shape[axis] = -1
        images = np.add.reduceat(images, starts, axis=axis) / widths.reshape(shape)
    return (images / 16).astype(np.uint8)
