"""How well maps of surprise point at the pixels that masks mark.

    pixel AUROC   P(marked pixel > unmarked pixel) + P(equal) / 2
    AUPRO         the mean share of a defect's region that a threshold finds, integrated over the
                  rate of false positive pixels from 0 to 0.3, divided by 0.3

A region is a connected component of a mask, corners touching; in AUPRO a small one weighs as much
as a large one. Unmarked pixels of outliers and all pixels of normal images can be false positives.

No map is kept: values are counted in 2^18 levels, float32 cut to its leading 18 bits, so that
values within 0.2 % of one another may tie, and memory does not grow with the images.

References:
    "The MVTec Anomaly Detection Dataset: A Comprehensive Real-World Dataset for Unsupervised
    Anomaly Detection" (Bergmann, Batzner, Fauser, Sattlegger, Steger, 2021)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalyd.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FALSE_POSITIVES", "Localisation", "PixelCounts", "regions"]

FALSE_POSITIVES = 0.3  # AUPRO: beyond this rate a map helps nobody
BITS = 18
LEVELS = 1 << BITS


@dataclass(frozen=True)
class Localisation:
    """How well maps point.

    Attributes:
        pixel_auroc: over all pixels, in [0, 1].
        aupro: over all regions, up to a rate of false positive pixels of 0.3, in [0, 1].
    """

    pixel_auroc: float
    aupro: float


def _zeros() -> NDArray[np.float64]:
    return np.zeros(LEVELS)


@dataclass(frozen=True, eq=False)
class PixelCounts:
    """Pixels by their level, ascending; `add` counts a map, `+` joins two counts.

    Attributes:
        unmarked: float64 (LEVELS,): pixels outside masks.
        marked: float64 (LEVELS,): pixels inside.
        overlap: float64 (LEVELS,): those with weights that sum to 1 over each region.
    """

    unmarked: NDArray[np.float64] = field(default_factory=_zeros)
    marked: NDArray[np.float64] = field(default_factory=_zeros)
    overlap: NDArray[np.float64] = field(default_factory=_zeros)

    def add(self, values: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> None:
        """Count the pixels of one image.

        Args:
            values: float (H, W), higher is stranger; NaN counts as strangest.
            mask: bool (H, W), True where the image is unusual; None for a normal image.

        Raises:
            UsageError: a mask of another shape.
        """
        level = _level(values)
        if mask is None:
            self.unmarked[:] += np.bincount(level.ravel(), minlength=LEVELS)
            return
        if mask.shape != values.shape:
            raise UsageError(f"a mask must have its map's shape {values.shape}, not {mask.shape}")
        region = regions(mask)[mask] - 1
        weight = 1 / np.bincount(region) if region.size else np.empty(0)
        self.unmarked[:] += np.bincount(level[~mask], minlength=LEVELS)
        self.marked[:] += np.bincount(level[mask], minlength=LEVELS)
        self.overlap[:] += np.bincount(level[mask], weight[region], minlength=LEVELS)

    def __add__(self, other: PixelCounts) -> PixelCounts:
        return PixelCounts(
            self.unmarked + other.unmarked,
            self.marked + other.marked,
            self.overlap + other.overlap,
        )

    def __bool__(self) -> bool:
        """Whether there are both marked and unmarked pixels, which every measure needs."""
        return bool(self.marked.any() and self.unmarked.any())

    def localisation(self) -> Localisation | None:
        """Both measures, or None where they are not defined."""
        return Localisation(self.pixel_auroc(), self.aupro()) if self else None

    def pixel_auroc(self) -> float:
        """P(marked pixel > unmarked pixel) + P(equal) / 2, in [0, 1].

        Raises:
            UsageError: no marked pixel, or no unmarked one.
        """
        self._check()
        below = np.cumsum(self.unmarked) - self.unmarked / 2
        return float(self.marked @ below / (self.marked.sum() * self.unmarked.sum()))

    def aupro(self, limit: float = FALSE_POSITIVES) -> float:
        """The mean overlap with regions, over rates of false positives up to a limit, in [0, 1].

        Args:
            limit: that rate, in (0, 1].

        Raises:
            UsageError: no marked pixel, or no unmarked one.
        """
        self._check()
        rate = _from_the_top(self.unmarked)
        overlap = _from_the_top(self.overlap)
        inside = int(np.searchsorted(rate, limit, side="right"))
        if inside == len(rate):  # only a limit of 1 holds the whole curve
            return float(np.trapezoid(overlap, rate) / limit)
        run = (limit - rate[inside - 1]) / (rate[inside] - rate[inside - 1])
        last = overlap[inside - 1] + run * (overlap[inside] - overlap[inside - 1])
        x, y = np.append(rate[:inside], limit), np.append(overlap[:inside], last)
        return float(np.trapezoid(y, x) / limit)

    def _check(self) -> None:
        if not self:
            raise UsageError(
                "pixel measures need marked and unmarked pixels: the masks mark "
                + ("all of them" if self.marked.any() else "none")
            )


def regions(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The connected components of a mask, pixels that touch at a corner connected.

    Args:
        mask: bool (H, W).

    Returns:
        intp (H, W): 0 outside the mask, 1 to R in the region of that number.
    """
    height, width = mask.shape
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    # Runs of marked pixels along the rows, in reading order: all of a row before the next.
    row, start = np.nonzero(edges == 1)
    stop = np.nonzero(edges == -1)[1]
    stride = width + 2  # a gap, so that the end of a row does not touch the next one's start
    above = (row - 1) * stride
    # The runs of the row above that touch run i, or one of its corners: first[i] .. last[i] - 1.
    first = np.searchsorted(row * stride + stop, above + start, side="left")
    last = np.searchsorted(row * stride + start, above + stop, side="right")
    root = list(range(len(row)))

    def find(run: int) -> int:
        while root[run] != run:
            root[run] = run = root[root[run]]
        return run

    for run, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        for other in range(low, high):
            root[find(run)] = find(other)
    _, number = np.unique([find(run) for run in root], return_inverse=True)
    labels = np.zeros((height, width), np.intp)
    labels[mask] = np.repeat(number + 1, stop - start)
    return labels


def _level(values: NDArray[Any]) -> NDArray[np.uint32]:
    """0 .. LEVELS - 1, in the order of the values: the leading bits of an IEEE 754 number.

    Positive numbers are ordered as their bits are, negative ones the other way round.
    """
    with np.errstate(over="ignore"):
        numbers = np.where(np.isnan(values), np.inf, values).astype(np.float32)
    bits: NDArray[np.uint32] = (numbers + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ordered = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
    return ordered >> np.uint32(32 - BITS)


def _from_the_top(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share at or above each level, from above the highest one downwards."""
    total = np.concatenate([[0.0], np.cumsum(counts[::-1])])
    share: NDArray[np.float64] = total / total[-1]
    return share
