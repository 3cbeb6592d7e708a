"""Scores: one number an image that verdicts rest on, higher for stranger.

    nll          -log p(x): blind to what is simpler than the training images, never a verdict
    typicality   |F(nll) - 1/2|, F the ranks in the fit split: strange on either side

Everything a score needs to know comes from the fit split, never from the calibration split: a
score that looked at the calibration images would not be exchangeable with theirs, and the
promise would be void.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from anomalyd.errors import BundleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = [
    "SCORES",
    "Score",
    "finite",
    "make_score",
    "negative_log_likelihood",
    "typicality",
]

Score = Callable[["Floats"], "Floats"]
"""Negative log-likelihoods, float64 (N,) nats, to scores, float64 (N,)."""

LARGEST = float(np.finfo(np.float64).max)


def make_score(name: str, fit_nll: Floats) -> Score:
    """The score called `name`, made ready for a fit split.

    Args:
        name: a key of `SCORES`.
        fit_nll: float64 (m,), sorted ascending, nats.

    Raises:
        BundleError: no such score in this version.
    """
    if name not in SCORES:
        raise BundleError(
            f"score {name!r} is not known here, only {', '.join(SCORES)}; upgrade anomalyd"
        )
    return SCORES[name](fit_nll)


def typicality(nll: Floats, fit_nll: Floats) -> Floats:
    """|F(nll) - 1/2| with F the mid-ranks in the sorted fit split, linear between them.

    Beyond the fit split's ends, where ranks would tie, it is 1/2 + distance / IQR and goes on
    growing, so that far outliers stay ordered.

    Args:
        nll: float64 (N,), nats.
        fit_nll: float64 (m,), sorted ascending, nats.

    Returns:
        float64 (N,), in [0, 1/2] within the fit split's range and above 1/2 outside it.

    References:
        "Detecting out-of-distribution inputs to deep generative models using typicality"
        (Nalisnick, Matsukawa, Teh, Lakshminarayanan, 2019)
    """
    return _typicality(fit_nll)(nll)


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


def _typicality(fit_nll: Floats) -> Score:
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


def _nll(_: Floats) -> Score:
    return finite


SCORES: dict[str, Callable[[Floats], Score]] = {"nll": _nll, "typicality": _typicality}
