"""Scores: one number an image that verdicts rest on, higher for stranger.

    nll                 -log p(x): blind to what is simpler than the training images, never a
                        verdict
    typicality          |F(nll) - 1/2|, F the ranks in the fit split: strange on either side
    density_of_states   how far from its nearest normal images, in the space of all statistics
    nearest_normals     the same, and how far in the space of codes, either being enough
    class_nearest_normals
                        that within each class: an image is as strange as it is to the class that
                        it suits best
    texture             how unusual a photograph's neighbourhoods and grain are (texture.py)

Everything a score needs to know comes from the fit split, never from the calibration split: a
score that looked at the calibration images would not be exchangeable with theirs, and the
promise would be void. Nor from outliers: none could reach a fit, for no argument takes any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Protocol

import numpy as np

from anomalyd.errors import BundleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Statistics = NDArray[np.float32] | NDArray[np.float64]
    Codes = Statistics

__all__ = [
    "BY_CLASS",
    "BY_CODE",
    "SCORES",
    "ClassNearestNormals",
    "Fit",
    "Score",
    "finite",
    "make_score",
    "negative_log_likelihood",
    "typicality",
]

LARGEST = float(np.finfo(np.float64).max)
BY_CLASS = "class_nearest_normals"
"""The score of bundles that reject what fits no class; `ClassNearestNormals` makes it."""
BY_CODE = "nearest_normals"
"""The score of bundles that have an encoder."""
NEIGHBOURS = 5
FEWEST = 10
"""Images of a class that can stand for it."""
BLOCK = 64
"""Images whose distances to the fit split are held at a time."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What the graph says of the normal images that a score is fitted to.

    Attributes:
        nll: float64 (m,), nats.
        statistics: (m, S), row by row of the same images.
        codes: (m, E), what an encoder makes of them; None without one.
        labels: int64 (m,), their classes; None without.
    """

    nll: Floats
    statistics: Statistics
    codes: Codes | None = None
    labels: NDArray[np.int64] | None = None


class Score(Protocol):
    """Negative log-likelihoods (N,), nats, statistics (N, S) and codes (N, E), to scores (N,)."""

    def __call__(
        self, nll: Floats, statistics: Statistics, codes: Codes | None = None
    ) -> Floats: ...


def make_score(name: str, fit: Fit) -> Score:
    """The score called `name`, made ready for a fit split.

    Args:
        name: a key of `SCORES`.
        fit: normal images, m >= 1, with what the score needs.

    Raises:
        BundleError: no such score in this version.
    """
    if name not in SCORES:
        raise BundleError(
            f"score {name!r} is not known here, only {', '.join(SCORES)}; upgrade anomalyd"
        )
    return SCORES[name](fit)


def typicality(nll: Floats, fit_nll: Floats) -> Floats:
    """|F(nll) - 1/2| with F the mid-ranks in the sorted fit split, linear between them.

    Beyond the fit split's ends, where ranks would tie, it is 1/2 + distance / IQR and goes on
    growing, so that far outliers stay ordered.

    Args:
        nll: float64 (N,), nats.
        fit_nll: float64 (m,), nats.

    Returns:
        float64 (N,), in [0, 1/2] within the fit split's range and above 1/2 outside it.

    References:
        "Detecting out-of-distribution inputs to deep generative models using typicality"
        (Nalisnick, Matsukawa, Teh, Lakshminarayanan, 2019)
    """
    return _typicality(fit_nll)(nll)


class DensityOfStates:
    """The mean distance to the five nearest of m normal images, in statistics made comparable.

    Each of the S + 1 columns, -log p(x) and the statistics, is replaced by the normal quantile
    of its rank in the fit split; beyond the fit split's ends it goes on in a straight line whose
    unit is the spread of the central 96 %. Distances are Euclidean. No column stands: each misses
    outliers that another sees, and two that are each usual can be unusual together.

    It is a score, not p(x), and without meaning across bundles.

    References:
        "Density of States Estimation for Out-of-Distribution Detection" (Morningstar et al.,
        2021);
        the rank transform: "The nonparanormal" (Liu, Lafferty, Wasserman, 2009);
        nearest neighbours: "Efficient algorithms for mining outliers from large data sets"
        (Ramaswamy, Rastogi, Shim, 2000).

    Args:
        fit: normal images.
    """

    def __init__(self, fit: Fit) -> None:
        columns = _columns(fit.nll, fit.statistics)
        self._compared = _Gaussian(columns)
        self._cloud = _Cloud(self._compared(columns))

    def __call__(self, nll: Floats, statistics: Statistics, codes: Codes | None = None) -> Floats:
        """Score N images: float64 (N,), at least 0, finite."""
        return self._cloud.distance(self._compared(_columns(nll, statistics)))


class NearestNormals:
    """log(exp a + exp b): how strange an image is in its statistics, a, and in its code, b.

    a is the distance of `DensityOfStates`; b that of the code's direction z / |z| to those of the
    five nearest normal images. Each is replaced by the normal quantile of its rank among the fit
    split's own, measured without themselves, and goes on in a straight line beyond: so the two
    compare, and either is enough. Statistics see how an image departs from normal ones, codes see
    that nothing normal looks like it.

    It is a score, not p(x), and without meaning across bundles.

    References:
        as for `DensityOfStates`; codes: "Out-of-Distribution Detection with Deep Nearest
        Neighbors" (Sun, Ming, Zhu, Li, 2022).

    Args:
        fit: normal images, with codes.
    """

    def __init__(self, fit: Fit) -> None:
        if fit.codes is None:
            raise BundleError(f"score {BY_CODE} needs the codes of the fit split")
        columns = _columns(fit.nll, fit.statistics)
        self._compared = _Gaussian(columns)
        self._normals = _Normals(self._compared(columns), fit.codes)

    def __call__(self, nll: Floats, statistics: Statistics, codes: Codes | None = None) -> Floats:
        """Score N images: float64 (N,), finite."""
        return self._normals(self._compared(_columns(nll, statistics)), codes)


class ClassNearestNormals:
    """The least of `NearestNormals` over classes: how strange to the class that suits best.

    Columns are made comparable over all classes, then each class has its own normal images, in
    statistics and in codes, and its own ranks of distances among them. Classes with fewer than
    ten such images are judged by all of them together.

    Args:
        fit: normal images with labels; codes are used where there are any.
    """

    def __init__(self, fit: Fit) -> None:
        labels = fit.labels
        if labels is None:
            raise BundleError(f"score {BY_CLASS} needs the labels of the fit split")
        columns = _columns(fit.nll, fit.statistics)
        self._compared = _Gaussian(columns)
        rows = self._compared(columns)
        owns = [labels == y for y in np.unique(labels)]
        common = [own for own in owns if own.sum() >= FEWEST]
        if len(common) < len(owns):
            common.append(np.ones(len(labels), np.bool_))
        self._classes = [
            _Normals(rows[own], None if fit.codes is None else fit.codes[own]) for own in common
        ]

    def __call__(self, nll: Floats, statistics: Statistics, codes: Codes | None = None) -> Floats:
        """Score N images: float64 (N,), finite."""
        rows = self._compared(_columns(nll, statistics))
        least: Floats = np.min([normals(rows, codes) for normals in self._classes], axis=0)
        return least


class _Normals:
    """Normal images by their comparable columns and codes, and how strange others are to them."""

    def __init__(self, rows: Floats, codes: Codes | None) -> None:
        self._states = _Ranked(rows)
        self._codes = None if codes is None else _Ranked(_directions(codes))

    def __call__(self, rows: Floats, codes: Codes | None) -> Floats:
        states = self._states(rows)
        if self._codes is None or codes is None:
            return states
        strangeness: Floats = np.logaddexp(states, self._codes(_directions(codes)))
        return strangeness


class _Cloud:
    """Rows, and how far others are from the nearest of them."""

    def __init__(self, rows: Floats) -> None:
        # |a - b|^2 - |a|^2 = (a, 1) (-2 b, |b|^2): one product orders all rows b by distance.
        self._rows = np.vstack([-2 * rows.T, np.square(rows).sum(axis=1)])

    def distance(self, at: Floats, *, skip: int = 0) -> Floats:
        """The mean distance of each row to the nearest ones, after the `skip` very nearest."""
        parts = [self._nearest(at[i : i + BLOCK], skip) for i in range(0, len(at), BLOCK)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _nearest(self, at: Floats, skip: int) -> Floats:
        apart = np.column_stack([at, np.ones(len(at))]) @ self._rows
        upto = min(NEIGHBOURS + skip, self._rows.shape[1])
        apart.partition(upto - 1, axis=1)
        nearest = apart[:, :upto]
        if skip and upto > skip:
            nearest = np.sort(nearest, axis=1)[:, skip:]
        squares = nearest + np.square(at).sum(axis=1)[:, None]
        mean: Floats = np.sqrt(np.maximum(squares, 0)).mean(axis=1)
        return mean


class _Ranked:
    """The distance to a cloud, as the normal quantile of its rank among the cloud's own."""

    def __init__(self, rows: Floats) -> None:
        self._cloud = _Cloud(rows)
        self._rank = _Gaussian(self._cloud.distance(rows, skip=1)[:, None])

    def __call__(self, at: Floats) -> Floats:
        return self._rank(self._cloud.distance(at)[:, None])[:, 0]


def _directions(codes: Codes) -> Floats:
    """z / |z|; a code of zeros, or of what is no number, has no direction and stays at zero."""
    codes = np.nan_to_num(codes.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    length = np.sqrt(np.square(codes).sum(axis=1, keepdims=True))
    directions: Floats = codes / np.where(length > 0, length, 1.0)
    return directions


class _Gaussian:
    """S columns, each value as the normal quantile of its mid-rank among m, and a line beyond."""

    FURTHEST = 1e4
    """In standard deviations; its square still adds up without loss."""

    def __init__(self, columns: Floats) -> None:
        low, high = np.quantile(columns, [0.02, 0.98], axis=0)
        self._least, self._most = columns.min(axis=0), columns.max(axis=0)
        # A column that hardly varies still gets a unit: its range, or one.
        spread = np.where(high > low, high - low, self._most - self._least)
        unit = spread / (2 * NormalDist().inv_cdf(0.98))
        self._units = np.where(unit > 0, unit, 1.0)
        self._ranks = [_mid_ranks(column) for column in columns.T]

    def __call__(self, columns: Floats) -> Floats:
        with np.errstate(over="ignore"):
            beyond = (columns - np.clip(columns, self._least, self._most)) / self._units
        inside = np.empty_like(columns)
        for column, ranks in enumerate(self._ranks):
            inside[:, column] = np.interp(columns[:, column], *ranks)
        clipped: Floats = np.clip(inside + beyond, -self.FURTHEST, self.FURTHEST)
        return clipped


def _mid_ranks(values: Floats) -> tuple[Floats, Floats]:
    """Distinct values in order, and the normal quantile of each one's mid-rank."""
    distinct, count = np.unique(values, return_counts=True)
    first = np.cumsum(count) - count
    # The rank of values that stand alone is a whole number and a half, of ties the middle.
    return distinct, _quantiles(len(values))[2 * first + count - 1]


@cache
def _quantiles(m: int) -> Floats:
    """The normal quantiles of 1 / 2m, 2 / 2m, ... (2m - 1) / 2m: of every mid-rank of m values."""
    quantile = NormalDist().inv_cdf
    return np.array([quantile(k / 2 / m) for k in range(1, 2 * m)])


def _columns(nll: Floats, statistics: Statistics) -> Floats:
    return finite(np.column_stack([nll, statistics.astype(np.float64)]))


def negative_log_likelihood(log_likelihood: Floats, priors: Sequence[float] | None) -> Floats:
    """-log p(x), with classes p(x) = sum over y of p(y) p(x|y).

    Args:
        log_likelihood: float64 (N, K), nats.
        priors: K probabilities; None for equal ones.

    Returns:
        float64 (N,), nats, finite.
    """
    classes = log_likelihood.shape[1]
    if classes == 1:
        return finite(-log_likelihood[:, 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        joint = log_likelihood + np.log(priors or [1 / classes] * classes)
        return finite(-np.logaddexp.reduce(joint, axis=1))


def finite(values: Floats) -> Floats:
    """Infinities clamped to the largest float64, NaN counted as +infinity: JSON knows neither."""
    clamped: Floats = np.nan_to_num(values, nan=LARGEST, posinf=LARGEST, neginf=-LARGEST)
    return clamped


def _typicality(fit_nll: Floats) -> Callable[[Floats], Floats]:
    values, first, count = np.unique(fit_nll, return_index=True, return_counts=True)
    mid_rank = (first + count / 2) / fit_nll.size
    lowest, highest = float(values[0]), float(values[-1])
    lower, upper = np.quantile(fit_nll, [0.25, 0.75])
    # A fit split that hardly varies still gets a unit: its range, or a nat.
    unit = float(upper - lower) or (highest - lowest) or 1.0

    def score(nll: Floats) -> Floats:
        nll = finite(nll)
        inside = np.abs(np.interp(nll, values, mid_rank) - 0.5)
        beyond = np.maximum(lowest / 2 - nll / 2, nll / 2 - highest / 2)  # halves cannot overflow
        with np.errstate(over="ignore"):
            outside = 0.5 + beyond * (2 / unit)
        return finite(np.where(beyond > 0, outside, inside))

    return score


SCORES: dict[str, Callable[[Fit], Score]] = {
    "nll": lambda _: _by_nll(finite),
    "typicality": lambda fit: _by_nll(_typicality(fit.nll)),
    "density_of_states": DensityOfStates,
    BY_CODE: NearestNormals,
    BY_CLASS: ClassNearestNormals,
}


def _by_nll(score: Callable[[Floats], Floats]) -> Score:
    return lambda nll, statistics, codes=None: score(nll)
