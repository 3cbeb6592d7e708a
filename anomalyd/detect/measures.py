"""How well a score tells outliers from normal images.

Outliers are the positive class everywhere, and higher scores are stranger. Every function takes
the scores of N normal images and of M outliers, N and M at least 1, in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

__all__ = ["Separation", "aupr", "auroc", "auroc_interval", "caught", "fpr95", "separation"]

Z95 = 1.959964  # standard normal quantile at 0.975


@dataclass(frozen=True)
class Separation:
    """One score on one set of outliers.

    Attributes:
        auroc: probability that an outlier scores above a normal image, ties half, in [0, 1].
        auroc_ci95: its 95 % confidence interval.
        aupr: mean precision over the outliers caught, in [0, 1], at the base rate asked for.
        fpr95: rate of false alarms where 95 % of the outliers are caught.
    """

    auroc: float
    auroc_ci95: tuple[float, float]
    aupr: float
    fpr95: float


def separation(normal: ArrayLike, outliers: ArrayLike, base_rate: float) -> Separation:
    """All four measures."""
    return Separation(
        auroc(normal, outliers),
        auroc_interval(normal, outliers),
        aupr(normal, outliers, base_rate),
        fpr95(normal, outliers),
    )


def auroc(normal: ArrayLike, outliers: ArrayLike) -> float:
    """P(outlier > normal) + P(outlier = normal) / 2 over all pairs."""
    return float(np.mean(_placements(normal, outliers)))


def auroc_interval(normal: ArrayLike, outliers: ArrayLike) -> tuple[float, float]:
    """A 95 % confidence interval of the AUROC A: Wilson's for a share of K trials.

    K = A (1 - A) / V, with V = var(share of normals below an outlier) / M + var(share of outliers
    above a normal) / N as DeLong et al. have it; but at most 2 min(N, M), the K of exponential
    scores near A = 1, for there V is often 0 by luck.

    References:
        "Comparing the areas under two or more correlated receiver operating characteristic
        curves: a nonparametric approach" (DeLong, DeLong, Clarke-Pearson, 1988)
        "Probable inference, the law of succession, and statistical inference" (Wilson, 1927)
        "The meaning and use of the area under a receiver operating characteristic (ROC) curve"
        (Hanley, McNeil, 1982), for exponential scores
    """
    below, above = _placements(normal, outliers), 1 - _placements(outliers, normal)
    area = float(np.mean(below))
    trials = 2.0 * min(below.size, above.size)
    variance = sum(
        float(np.var(each, ddof=1)) / each.size for each in (below, above) if each.size > 1
    )
    if variance * trials > area * (1 - area):
        trials = area * (1 - area) / variance
    shrink = 1 + Z95**2 / trials
    middle = (area + Z95**2 / (2 * trials)) / shrink
    half = Z95 * math.sqrt(area * (1 - area) / trials + (Z95 / (2 * trials)) ** 2) / shrink
    return max(0.0, min(area, middle - half)), min(1.0, max(area, middle + half))


def aupr(normal: ArrayLike, outliers: ArrayLike, base_rate: float) -> float:
    """The mean over outliers of the precision at each one's score (average precision).

    precision = b TPR / (b TPR + (1 - b) FPR) with b the base rate, the share of outliers; a score
    that knows nothing has b.

    Args:
        normal: (N,) scores.
        outliers: (M,) scores.
        base_rate: in (0, 1); M / (N + M) for the sets as they are.
    """
    normal, outliers = np.sort(np.asarray(normal, np.float64)), np.sort(np.asarray(outliers))
    caught = 1 - np.searchsorted(outliers, outliers, side="left") / outliers.size
    alarms = 1 - np.searchsorted(normal, outliers, side="left") / normal.size
    true, false = base_rate * caught, (1 - base_rate) * alarms
    return float(np.mean(true / (true + false)))


def fpr95(normal: ArrayLike, outliers: ArrayLike) -> float:
    """The share of normal images flagged by the highest threshold that flags 95 % of outliers.

    "Flagged" is score >= threshold.
    """
    descending = np.sort(np.asarray(outliers, np.float64))[::-1]
    threshold = descending[math.ceil(0.95 * descending.size) - 1]
    return float(np.mean(np.asarray(normal, np.float64) >= threshold))


def caught(normal: ArrayLike, outliers: ArrayLike, false_alarms: NDArray[np.intp]) -> Floats:
    """The ROC curve: the share of outliers above all normal images but some.

    Args:
        normal: (N,) scores.
        outliers: (M,) scores.
        false_alarms: (K,): how many normal images may be flagged, 0 to N.

    Returns:
        float64 (K,), in [0, 1].
    """
    descending = np.append(np.sort(np.asarray(normal, np.float64))[::-1], -np.inf)
    ordered = np.sort(np.asarray(outliers, np.float64))
    upto = np.searchsorted(ordered, descending[false_alarms], side="right")
    found: Floats = 1 - upto / ordered.size
    return found


def _placements(normal: ArrayLike, outliers: ArrayLike) -> Floats:
    """For each outlier the share of normal images below it, ties half: float64 (M,)."""
    ordered, outliers = np.sort(np.asarray(normal, np.float64)), np.asarray(outliers, np.float64)
    below = np.searchsorted(ordered, outliers, side="left")
    upto = np.searchsorted(ordered, outliers, side="right")
    share: Floats = (below + upto) / (2 * ordered.size)
    return share
