"""Photographs of surfaces: how unusual the neighbourhood of each pixel is, and so the photograph.

    a few channels      what a straight line through the pixels before it leaves of a pixel's
    of every pixel      brightness; its size, and its products with the neighbours'; gradients;
                        brightness; what the density says: nll and excess
    windows             means of the channels over six windows, from 3 x 3 to lines of 33 pixels
    a density           of these means over all pixels of normal photographs: one Gaussian
    surprise            -log of the share of those pixels, as far from the border as this one,
                        that are at least as unusual; its exponentials averaged with those of
                        the line of the grain that the pixel is in, where there is grain (grain.py)
    a score             log of the mean over all pixels of 1 / share, without the grain, and the
                        sharpest step of the grain, each in interquartile ranges from the median
                        of normal photographs; their sum

The density's map alone says where single pixels are improbable; a defect is where many pixels in
a row are a little odd, in the same way. What is usual depends on the way to the border, for light,
burr and edges are normal there. Everything is fitted on normal photographs that calibration does
not see.

References:
    windows and a Gaussian: "PaDiM: A Patch Distribution Modeling Framework for Anomaly Detection
    and Localization" (Defard, Setkov, Loesch, Audigier, 2021), there of a network's features;
    the mean of 1 / p: "The harmonic mean p-value for combining dependent tests" (Wilson, 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from anomalyd.detect import grain
from anomalyd.detect.npz import pack_arrays, unpack_arrays
from anomalyd.errors import BundleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

__all__ = ["Field", "Texture"]

WINDOWS = ((3, 3), (9, 9), (1, 33), (3, 33), (33, 1), (9, 33))  # rows x columns, odd
REACH = 4  # rows above, and columns to either side, that the line sees
HALO = 16 + REACH + 1  # rows beyond a band that its features depend on
BAND = 1 << 17  # pixels whose features are held at a time
BORDERS = np.array([1, 3, 6, 12, 24])  # pixels to the nearest border, where a class ends
LEVELS = np.arange(0, 7.01, 0.125)  # nats: -log of the shares whose quantiles are kept
FEWEST = 2_000  # pixels in a class; one with fewer takes the quantiles of all
CHANNELS = 12
RIDGE = 1e-2

_ARRAYS = {
    "line": ("<f8", 1),
    "spread": ("<f8", 1),
    "mean": ("<f8", 1),
    "whiten": ("<f8", 2),
    "quantiles": ("<f8", 2),
    "direction": ("<i8", 1),
    "lines": ("<f8", 1),
    "usual": ("<f8", 2),
}
_NO_GRAIN = {
    "direction": np.array([grain.NO_GRAIN]),
    "lines": LEVELS,
    "usual": np.array([[0.0, 0.0], [1.0, 1.0]]),
}


class Field(NamedTuple):
    """A photograph, scaled down, and what the density says of each of its pixels.

    Attributes:
        grey: float32 (H, W), 0..255.
        nll: float32 (H, W), nats.
        excess: float32 (H, W), standard deviations.
        grain: of the photograph, less scaled down: along its columns, and along its rows.
    """

    grey: Floats
    nll: Floats
    excess: Floats
    grain: tuple[grain.Reading, grain.Reading]


@dataclass(frozen=True, eq=False)
class Texture:
    """What is usual around a pixel, the content of `texture.npz`.

    Attributes:
        line: float64 (P,), from log brightness before a pixel, and 1, to its own.
        spread: float64 (1,), standard deviation of what that leaves.
        mean: float64 (F,), of the window means.
        whiten: float64 (F, F): distance^2 = |(x - mean) whiten|^2.
        quantiles: float64 (B, Q), rising: distance^2 / 2 that a share exp(-LEVELS) of the pixels
            exceeds, by distance from the border.
        direction: int64 (1,), of the grain: 0 along columns, 1 along rows, -1 none.
        lines: float64 (Q,), rising: how far apart a share exp(-LEVELS) of the lines exceeds.
        usual: float64 (2, 2), median and interquartile range of both parts of the score over
            normal photographs; 0 and 1 where there is no grain.
    """

    line: NDArray[np.float64]
    spread: NDArray[np.float64]
    mean: NDArray[np.float64]
    whiten: NDArray[np.float64]
    quantiles: NDArray[np.float64]
    direction: NDArray[np.int64]
    lines: NDArray[np.float64]
    usual: NDArray[np.float64]

    def judge(self, field: Field) -> tuple[float, Floats]:
        """Score a photograph, 0 for a typical one, and map its surprise.

        Returns:
            The score, and float32 (H, W), nats, >= 0: -log of the share of normal pixels that
            are as unusual, where there is grain of the harmonic mean of that and the share of
            normal lines.
        """
        surprise = self._surprise(field)
        parts = self._parts(field, surprise)
        score = float(((parts - self.usual[0]) / self.usual[1]).sum())
        direction = int(self.direction[0])
        if direction != grain.NO_GRAIN:
            apart = _stretched(field.grain[direction].apart, surprise.shape[direction])
            lines = _tail(apart, self.lines).astype(np.float32)
            across = lines[:, None] if direction == 0 else lines
            np.logaddexp(surprise, across, out=surprise)
            surprise -= np.float32(np.log(2))
        return score, surprise

    @staticmethod
    def fit(normal: Sequence[Field]) -> Texture:
        """Fit to normal photographs, at least one."""
        line, spread = _fit_line([field.grey for field in normal])
        blank = np.empty(0)
        features = Texture(line, spread, blank, blank, blank, **_NO_GRAIN)
        many = CHANNELS * len(WINDOWS)
        total, squares, count = np.zeros(many), np.zeros((many, many)), 0
        for field in normal:
            for band in features._bands(field):
                some = band.reshape(-1, band.shape[2])[::3].astype(np.float64)
                total, squares = total + some.sum(axis=0), squares + some.T @ some
                count += len(some)
        mean = total / count
        covariance = squares / count - np.outer(mean, mean)
        covariance += np.diag(RIDGE * np.diag(covariance) + 1e-9)
        whiten = np.linalg.cholesky(np.linalg.inv(covariance))
        fitted = replace(features, mean=mean, whiten=whiten)
        distances = [
            np.concatenate([fitted._distance(band) for band in fitted._bands(field)]).ravel()
            for field in normal
        ]
        near = np.concatenate([_border(*field.grey.shape).ravel() for field in normal])
        every = np.concatenate(distances)
        quantiles = []
        for place in range(len(BORDERS) + 1):
            here = every[near == place]
            quantiles.append(_quantiles(here if len(here) >= FEWEST else every))
        direction = grain.direction([field.grain for field in normal])
        apart = [field.grain[direction].apart for field in normal]
        fitted = replace(
            fitted,
            quantiles=np.array(quantiles),
            direction=np.array([direction]),
            lines=_quantiles(np.concatenate(apart)),
        )
        parts = [fitted._parts(field, fitted._surprise(field)) for field in normal]
        low, median, high = np.quantile(parts, [0.25, 0.5, 0.75], axis=0)
        return replace(fitted, usual=np.stack([median, np.where(high > low, high - low, 1)]))

    def pack(self) -> bytes:
        """Bytes of `texture.npz`; the same numbers always give the same bytes."""
        return pack_arrays(
            {key: np.asarray(getattr(self, key), dtype) for key, (dtype, _) in _ARRAYS.items()}
        )

    @staticmethod
    def unpack(data: bytes) -> Texture:
        """Content of `texture.npz`.

        Raises:
            BundleError: naming the array, the rule and what was found.
        """
        arrays = unpack_arrays(data, _ARRAYS, "texture.npz", later=_NO_GRAIN)
        texture = Texture(**{**_NO_GRAIN, **arrays})
        many = CHANNELS * len(WINDOWS)
        shapes = {
            "line": (len(_BEFORE) + 1,),
            "spread": (1,),
            "mean": (many,),
            "whiten": (many, many),
            "quantiles": (len(BORDERS) + 1, len(LEVELS)),
            "direction": (1,),
            "lines": (len(LEVELS),),
            "usual": (2, 2),
        }
        for key in fields(texture):
            array, shape = getattr(texture, key.name), shapes[key.name]
            if array.shape != shape or not np.isfinite(array).all():
                raise BundleError(
                    f"texture.npz: {key.name} must be finite and of the shape {shape}, not "
                    f"{array.shape}; train again"
                )
        if not (texture.spread > 0).all() or not (texture.usual[1] > 0).all():
            raise BundleError("texture.npz: spread and usual[1] must be positive; train again")
        if (np.diff(texture.quantiles) < 0).any() or (np.diff(texture.lines) < 0).any():
            raise BundleError("texture.npz: quantiles and lines must rise; train again")
        if texture.direction[0] not in (grain.NO_GRAIN, 0, 1):
            found = texture.direction[0]
            raise BundleError(
                f"texture.npz: direction must be -1, 0 or 1, not {found}; train again"
            )
        return texture

    def _surprise(self, field: Field) -> Floats:
        """-log of the share of normal pixels that are as unusual, float32 (H, W), >= 0."""
        height, width = field.grey.shape
        distance = np.concatenate([self._distance(band) for band in self._bands(field)])
        near = _border(height, width)
        surprise = np.empty((height, width), np.float32)
        for place, quantiles in enumerate(self.quantiles):
            here = near == place
            surprise[here] = _tail(distance[here], quantiles)
        return surprise

    def _parts(self, field: Field, surprise: Floats) -> NDArray[np.float64]:
        """Both parts of the score, (2,).

        Shares are uniform over normal pixels, and the mean of 1 / share over n of them is about
        log n: the first part grows with the size of a photograph, but as log log n.
        """
        direction = int(self.direction[0])
        step = 0.0 if direction == grain.NO_GRAIN else field.grain[direction].step
        return np.array([_log_mean_exp(surprise), step])

    def _distance(self, features: Floats) -> Floats:
        away = (features - self.mean.astype(np.float32)) @ self.whiten.astype(np.float32)
        distance: Floats = np.square(away).sum(axis=2) / 2
        return distance

    def _bands(self, field: Field) -> Iterator[Floats]:
        """The features of a few rows at a time, float32 (h, W, F)."""
        height, width = field.grey.shape
        step = max(1, BAND // width)
        for top in range(0, height, step):
            first, last = max(0, top - HALO), min(height, top + step + HALO)
            rows = slice(top - first, min(height, top + step) - first)
            channels = self._channels(*(part[first:last] for part in field[:3]))
            yield np.stack(
                [_window(channel, *size)[rows] for size in WINDOWS for channel in channels], axis=2
            )

    def _channels(self, grey: Floats, nll: Floats, excess: Floats) -> list[Floats]:
        log = np.log(grey + 8)
        weights = self.line.astype(np.float32)
        left = log - sum(w * x for w, x in zip(weights, _before(log), strict=False)) - weights[-1]
        left = np.clip(left / np.float32(self.spread[0]), -6, 6)
        excess = np.clip(excess, -6, 6)
        return [
            left,
            _log(left),
            left * _moved(left, 0, 1),
            left * _moved(left, 1, 0),
            left * _moved(left, 1, 1),
            left * _moved(left, 1, -1),
            _log(log - _moved(log, 0, 1), 0.01),
            _log(log - _moved(log, 1, 0), 0.01),
            log,
            nll,
            excess,
            _log(excess),
        ]


_BEFORE = [(y, x) for y in range(1, REACH + 1) for x in range(-REACH, REACH + 1)]
_BEFORE += [(0, x) for x in range(1, REACH + 1)]


def _before(image: Floats) -> Iterator[Floats]:
    """The image moved so that each earlier neighbour comes to stand on the pixel."""
    return (_moved(image, y, x) for y, x in _BEFORE)


def _moved(image: Floats, down: int, right: int) -> Floats:
    """The image moved, its border repeated."""
    height, width = image.shape
    padded = np.pad(image, ((down, 0), (max(right, 0), max(-right, 0))), mode="edge")
    return padded[:height, max(-right, 0) : max(-right, 0) + width]


def _log(values: Floats, floor: float = 0.1) -> Floats:
    logarithm: Floats = np.log(np.abs(values) + np.float32(floor))
    return logarithm


def _fit_line(images: Sequence[Floats]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least squares over every fifth pixel, and the spread of what is left."""
    many = len(_BEFORE) + 1
    normal, target, square, count = np.zeros((many, many)), np.zeros(many), 0.0, 0
    for image in images:
        log = np.log(image + 8)
        x = np.stack(
            [moved.ravel()[::5] for moved in _before(log)] + [np.ones_like(log.ravel()[::5])]
        )
        x, y = x.astype(np.float64), log.ravel()[::5].astype(np.float64)
        normal, target = normal + x @ x.T, target + x @ y
        square, count = square + float(y @ y), count + len(y)
    line = np.asarray(np.linalg.solve(normal + 1e-3 * np.eye(many), target), np.float64)
    left = float(square - 2 * line @ target + line @ normal @ line) / count
    return line, np.sqrt([max(left, 1e-12)])


def _window(channel: Floats, rows: int, columns: int) -> Floats:
    """Means over a window around each pixel, mirrored at the border."""
    up, left = rows // 2, columns // 2
    padded = np.pad(channel, ((up + 1, up), (left + 1, left)), mode="symmetric")
    sums = padded.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    inside = sums[rows:, columns:] - sums[:-rows, columns:]
    inside += sums[:-rows, :-columns] - sums[rows:, :-columns]
    means: Floats = (inside / (rows * columns)).astype(np.float32)
    return means


def _border(height: int, width: int) -> NDArray[np.intp]:
    """Which class of distance from the nearest border each pixel is in, (H, W)."""
    down, across = (
        np.digitize(np.minimum(np.arange(side), np.arange(side)[::-1]), BORDERS)
        for side in (height, width)
    )
    return np.minimum(down[:, None], across)


def _log_mean_exp(values: Floats) -> float:
    most = float(values.max())
    return most + float(np.log(np.mean(np.exp(values - most), dtype=np.float64)))


def _quantiles(distance: NDArray[np.floating]) -> NDArray[np.float64]:
    """The distances that shares exp(-LEVELS) exceed."""
    shares = 1 - np.exp(-LEVELS)
    quantiles: NDArray[np.float64] = np.quantile(distance.astype(np.float64), shares)
    return quantiles


def _stretched(lines: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Values of a photograph's lines at those of the photograph scaled down."""
    places = (np.arange(count) + 0.5) * len(lines) / count - 0.5
    stretched: NDArray[np.float64] = np.interp(places, np.arange(len(lines)), lines)
    return stretched


def _tail(distance: NDArray[np.floating], quantiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log of the share beyond, between quantiles and on in the line of the last nat."""
    nat = round(1 / (LEVELS[1] - LEVELS[0]))
    slope = 1 / max(float(quantiles[-1] - quantiles[-1 - nat]), 1e-6)
    beyond = np.maximum(distance - quantiles[-1], 0) * slope
    tail: NDArray[np.float64] = np.interp(distance, quantiles, LEVELS) + beyond
    return tail
