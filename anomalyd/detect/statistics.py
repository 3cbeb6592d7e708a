"""Scores: one number an image that verdicts rest on, higher for stranger.

    nll                 -log p(x): blind to what is simpler than the training images, never a
                        verdict
    typicality          |F(nll) - 1/2|, F the ranks in the fit split: strange on either side
    density_of_states   how far from its nearest normal images, in the space of all statistics
    class_density_of_states
                        the same within each class, with what the class has to say: K scores, and
                        an image is as strange as it is to the class it is least strange to
    texture             how unusual the neighbourhoods of a photograph's pixels are (texture.py)

Everything a score needs to know comes from the fit split, never from the calibration split: a
score that looked at the calibration images would not be exchangeable with theirs, and the
promise would be void. Nor from outliers: none could reach a fit, for no argument takes any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Protocol

import numpy as np

from anomalyd.errors import BundleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Statistics = NDArray[np.float32] | NDArray[np.float64]

__all__ = [
    "BY_CLASS",
    "SCORES",
    "ClassDensityOfStates",
    "Fit",
    "Score",
    "finite",
    "make_score",
    "negative_log_likelihood",
    "typicality",
]

LARGEST = float(np.finfo(np.float64).max)
BY_CLASS = "class_density_of_states"
"""The score of bundles that reject what fits no class; it is made by `ClassDensityOfStates`."""
NEIGHBOURS = 5
BLOCK = 64
"""Images whose distances to the fit split are held at a time."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What the graph says of the normal images that a score is fitted to.

    Attributes:
        nll: float64 (m,), nats.
        statistics: (m, S), row by row of the same images.
    """

    nll: Floats
    statistics: Statistics


class Score(Protocol):
    """Negative log-likelihoods, float64 (N,) nats, and statistics (N, S), to scores (N,)."""

    def __call__(self, nll: Floats, statistics: Statistics) -> Floats: ...


def make_score(name: str, fit: Fit) -> Score:
    """The score called `name`, made ready for a fit split.

    Args:
        name: a key of `SCORES`.
        fit: normal images, m >= 1.

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
        self._cloud = _Cloud(_columns(fit.nll, fit.statistics))

    def __call__(self, nll: Floats, statistics: Statistics) -> Floats:
        """Score N images: float64 (N,), at least 0, finite."""
        return self._cloud.distance(_columns(nll, statistics))


class ClassDensityOfStates:
    """`DensityOfStates` within each class: K scores an image, each of how strange to that class.

    The columns of class y are -log p(x|y), log p(x) - log p(x|y) (what the class fails to explain
    of what is known) and the statistics, fitted to the images of class y alone. So that classes
    compare, a distance is replaced by the normal quantile of its rank among those of the class's
    own fit images, each measured without itself.

    Args:
        log_likelihood: float64 (m, K), nats, of the fit split.
        statistics: (m, S), of the same images.
        labels: int64 (m,), their classes, each of K at least twice.
        priors: as for `negative_log_likelihood`.
    """

    def __init__(
        self,
        log_likelihood: Floats,
        statistics: Statistics,
        labels: NDArray[np.int64],
        priors: Sequence[float] | None,
    ) -> None:
        self._priors = priors
        self._clouds: list[_Cloud] = []
        self._ranks: list[_Gaussian] = []
        for y in range(log_likelihood.shape[1]):
            rows = labels == y
            own = self._columns(log_likelihood[rows], statistics[rows], y)
            cloud = _Cloud(own)
            self._clouds.append(cloud)
            self._ranks.append(_Gaussian(cloud.distance(own, without_itself=True)))

    def __call__(self, log_likelihood: Floats, statistics: Statistics) -> Floats:
        """Score N images against every class: float64 (N, K), higher is stranger, finite."""
        scores = [
            rank(cloud.distance(self._columns(log_likelihood, statistics, y)))
            for y, (cloud, rank) in enumerate(zip(self._clouds, self._ranks, strict=True))
        ]
        return np.stack(scores, axis=1)

    def _columns(self, log_likelihood: Floats, statistics: Statistics, y: int) -> Floats:
        nll = finite(-log_likelihood[:, y])
        unexplained = nll - negative_log_likelihood(log_likelihood, self._priors)
        return np.column_stack([finite(unexplained), _columns(nll, statistics)])


class _Cloud:
    """Rows of columns made comparable by their ranks, and how far others are from the nearest."""

    def __init__(self, columns: Floats) -> None:
        self._ranks = [_Gaussian(column) for column in columns.T]
        self._rows = self._transform(columns)
        self._squares = np.square(self._rows).sum(axis=1)

    def distance(self, columns: Floats, *, without_itself: bool = False) -> Floats:
        """The mean distance to the nearest rows, less the very nearest where that is itself."""
        at = self._transform(columns)
        skip = 1 if without_itself else 0
        parts = [self._nearest(at[i : i + BLOCK], skip) for i in range(0, len(at), BLOCK)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _transform(self, columns: Floats) -> Floats:
        return np.stack([r(c) for r, c in zip(self._ranks, columns.T, strict=True)], axis=1)

    def _nearest(self, at: Floats, skip: int) -> Floats:
        squares = np.square(at).sum(axis=1)[:, None] + self._squares - 2 * at @ self._rows.T
        upto = min(NEIGHBOURS + skip, len(self._rows))
        nearest = np.sort(np.partition(squares, upto - 1, axis=1)[:, :upto], axis=1)[:, skip:]
        mean: Floats = np.sqrt(np.maximum(nearest, 0)).mean(axis=1)
        return mean


class _Gaussian:
    """The normal quantile of a value's mid-rank among m values, and a line beyond them."""

    FURTHEST = 1e4
    """In standard deviations; its square still adds up without loss."""

    def __init__(self, values: Floats) -> None:
        self.values, count = np.unique(values, return_counts=True)
        first = np.cumsum(count) - count
        quantile = NormalDist().inv_cdf
        m = len(values)
        self.quantiles = np.array(
            [quantile((f + c / 2) / m) for f, c in zip(first, count, strict=True)]
        )
        low, high = np.quantile(values, [0.02, 0.98])
        # A column that hardly varies still gets a unit: its range, or one.
        spread = float(high - low) or float(self.values[-1] - self.values[0])
        self.unit = spread / (2 * quantile(0.98)) or 1.0

    def __call__(self, values: Floats) -> Floats:
        inside = np.interp(values, self.values, self.quantiles)
        with np.errstate(over="ignore"):
            below = np.minimum(values - self.values[0], 0) / self.unit
            above = np.maximum(values - self.values[-1], 0) / self.unit
        clipped: Floats = np.clip(inside + below + above, -self.FURTHEST, self.FURTHEST)
        return clipped


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
    "nll": lambda _: lambda nll, _: finite(nll),
    "typicality": lambda fit: _by_nll(_typicality(fit.nll)),
    "density_of_states": DensityOfStates,
}


def _by_nll(score: Callable[[Floats], Floats]) -> Score:
    return lambda nll, _: score(nll)
