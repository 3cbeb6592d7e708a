"""Surfaces that were ground, brushed or rolled: lines across the grain unlike the others.

    streaks   log brightness less its mean over five pixels across the grain
    line      the mean of the streaks over four pixels along the grain, for every pixel across it
    usual     this photograph's own line: the median over all, then three times the mean of that
              half of the lines that is nearest to it
    apart     log(mean square difference of a line and the usual one / variance of a line's noise)
    step      the largest such between two lines that follow one another

Where a surface was ground twice, the two parts differ in nothing but where their streaks lie.
Normal photographs cannot tell what is usual there, for each has streaks of its own: the rest of
the same photograph can. Only what spans the photograph from side to side is found.

Reference:
    the half that is nearest: "Computing LTS Regression for Large Data Sets" (Rousseeuw, Van
    Driessen, 2006), there of a regression.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NO_GRAIN", "Reading", "direction", "read"]

LINE = 4  # pixels along the grain
ACROSS = 5  # odd
CONCENTRATIONS = 3
BLOCK = 1 << 17  # pixels whose streaks are held at a time
FAINT = 0.1  # share of the variance of streaks below which a surface has no grain
FLOOR = 0.02  # a line that is the usual one has this log
NO_GRAIN = -1


class Reading(NamedTuple):
    """What the lines of a photograph say, in one direction.

    Attributes:
        apart: float64 (lines,), >= log 0.02: how unlike the photograph's usual line each one is.
        step: >= log 0.02: the sharpest change from line to line.
        share: of the variance of the streaks, what runs on from end to end, 0..1.
    """

    apart: NDArray[np.float64]
    step: float
    share: float


def read(image: NDArray[np.uint8]) -> tuple[Reading, Reading]:
    """Read a photograph as if its grain ran down the columns, and as if along the rows.

    Args:
        image: uint8 (H, W, C); with fewer lines than 8 nothing is unusual.
    """
    return _read(image), _read(image.transpose(1, 0, 2))


def direction(readings: Sequence[tuple[Reading, Reading]]) -> int:
    """Which of two readings has the grain of these surfaces: 0, 1, or `NO_GRAIN`.

    Args:
        readings: of normal photographs, at least one.
    """
    shares = np.median([[one.share for one in pair] for pair in readings], axis=0)
    best = int(shares.argmax())
    return best if shares[best] >= FAINT else NO_GRAIN


def _read(image: NDArray[np.uint8]) -> Reading:
    """Lines are rows here, the grain runs down."""
    height, width = image.shape[:2]
    if height < 2 * LINE:
        return Reading(np.full(height, np.log(FLOOR)), float(np.log(FLOOR)), 0.0)
    half = ACROSS // 2
    padded = np.pad(image, ((0, 0), (half, half), (0, 0)), mode="symmetric")
    lines = np.empty((height - LINE + 1, width), np.float32)
    usual = np.empty(width, np.float32)
    noise, squares, lasting = np.zeros(len(lines)), 0.0, 0.0
    block = max(1, BLOCK // height)
    for first in range(0, width, block):
        some = slice(first, min(width, first + block))
        streaks = _streaks(padded[:, some.start : some.stop + 2 * half])
        lines[:, some] = _runs(streaks)
        usual[some] = np.median(streaks, axis=0)
        noise += (_runs(streaks**2) - lines[:, some] ** 2).sum(axis=1, dtype=np.float64)
        squares += float(np.square(streaks).sum(dtype=np.float64))
        lasting += height * float(np.square(streaks.mean(axis=0)).sum(dtype=np.float64))
    noise = np.maximum(noise, 0) / width + 1e-6
    apart = _difference(lines, usual) / noise
    for _ in range(CONCENTRATIONS):
        usual = lines[apart <= np.median(apart)].mean(axis=0)
        apart = _difference(lines, usual) / noise
    step = _difference(lines[LINE:], lines[:-LINE]) / (noise[LINE:] + noise[:-LINE])
    # A line's place is its middle.
    places = np.arange(height) - (LINE - 1) / 2
    return Reading(
        np.interp(places, np.arange(len(lines)), np.log(apart + FLOOR)),
        float(np.log(step.max(initial=0) + FLOOR)),
        lasting / max(squares, 1e-9),
    )


def _streaks(padded: NDArray[np.uint8]) -> NDArray[np.float32]:
    log = np.log(padded.mean(axis=2, dtype=np.float32) + 8)
    half = ACROSS // 2
    streaks: NDArray[np.float32] = log[:, half:-half] - _runs(log.T, ACROSS).T
    return streaks


def _runs(rows: NDArray[np.float32], many: int = LINE) -> NDArray[np.float32]:
    """Means of each so many rows that follow one another."""
    count = len(rows) - many + 1
    total = np.zeros((count, rows.shape[1]), np.float32)
    for i in range(many):
        total += rows[i : i + count]
    total /= many
    return total


def _difference(lines: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mean square of each line less another, or less the same for all, a few at a time."""
    others = np.broadcast_to(others, lines.shape)
    difference = np.empty(len(lines))
    band = max(1, BLOCK // lines.shape[1])
    for first in range(0, len(lines), band):
        some = slice(first, first + band)
        difference[some] = np.square(lines[some] - others[some]).mean(axis=1, dtype=np.float64)
    return difference
