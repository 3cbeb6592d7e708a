"""Conformal p-values: from the ranks of scores to a rate of false alarms that can be promised.

With n calibration scores and one new score, all exchangeable, the rank r of the new score counted
from the strange end is uniform on 1..n+1 (or conservative where scores tie). Two tables turn that
rank into a p-value:

    marginal      p_r = r / (n + 1)                          on average over calibration sets
    conditional   p_r = C-quantile of Beta(r, n + 1 - r),    for this calibration set, with
                        or r / (n + 1) where that is larger  confidence C

"Outlier" is p <= alpha under both. The conditional table flags exactly the ranks r with
P(Beta(r, n + 1 - r) <= alpha) >= C that the marginal one flags, too: below a confidence of about
0.63 the quantiles alone would promise less than the average does. Needs numpy only.

References:
    "Algorithmic Learning in a Random World" (Vovk, Gammerman, Shafer, 2005)
    "Testing for outliers with conformal p-values" (Bates, Candes, Lei, Romano, Sesia, 2023)
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from anomalyd.errors import AlphaUnreachable, UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

__all__ = [
    "DEFAULT_ALPHA",
    "benjamini_hochberg",
    "check_alpha",
    "clopper_pearson",
    "confidences",
    "default_alpha",
    "false_alarm_band",
    "fewest_flags",
    "images_needed",
    "p_table",
    "p_values",
    "q_table",
    "ranks",
    "round_up",
    "smallest_alpha",
]

LEAST_ALPHA = 1e-12  # below, rounding hides what one image more or less does
MOST_CONFIDENCE = 1 - 1e-9
DEFAULT_ALPHA = 0.01


@lru_cache(maxsize=8)
def p_table(n: int, confidence: float | None = None) -> Floats:
    """The p-value of each rank: entry c is for a score that c of n calibration scores reach.

    Args:
        n: calibration scores, at least 1.
        confidence: None for the marginal table, C in (0, 1 - 1e-9] for the conditional one.

    Returns:
        float64 (n + 1,), read-only, strictly increasing in (0, 1]; the first entry is
        `smallest_alpha(n, C)`, the last is 1.

    Raises:
        UsageError: n below 1, or a confidence outside (0, 1 - 1e-9].
    """
    _check_n(n)
    rank = np.arange(1, n + 2, dtype=np.float64)
    table = rank / (n + 1)
    if confidence is not None:
        _check_confidence(confidence)
        quantiles = _beta_quantile(confidence, rank[:n], n + 1 - rank[:n])
        table[:n] = np.maximum(table[:n], quantiles)
        # To the last bit what default_alpha says: an ulp above it, nothing would be flagged.
        table[0] = smallest_alpha(n, confidence)
    table.setflags(write=False)
    return table


def confidences(table: Floats) -> Floats:
    """With what confidence over calibration sets each p-value of a table holds, but the last.

    Args:
        table: float64 (n + 1,) in (0, 1].

    Returns:
        float64 (n,) in [0, 1]: P(Beta(r, n + 1 - r) <= table[r - 1]).
    """
    n = len(table) - 1
    rank = np.arange(1, n + 1, dtype=np.float64)
    return _beta_cdf(table[:n], rank, n + 1 - rank, _log_beta(rank, n + 1 - rank))


def p_values(scores: ArrayLike, calibration_scores: Floats, table: Floats) -> Floats:
    """The conformal p-value of each score: `table[#{calibration scores >= score}]`.

    Args:
        scores: (N,), higher is stranger; NaN counts as strangest.
        calibration_scores: float64 (n,), sorted ascending.
        table: float64 (n + 1,), as `p_table` makes it.

    Returns:
        float64 (N,), in [table[0], 1]; never 0.
    """
    below = np.searchsorted(calibration_scores, np.asarray(scores, np.float64), side="left")
    result: Floats = table[calibration_scores.size - below]
    return result


def images_needed(alpha: float, confidence: float | None = None) -> int:
    """The fewest calibration images with which a p-value as small as alpha exists.

    1 / (n + 1) <= alpha, and 1 - (1 - alpha)^n >= C with a confidence.

    Raises:
        UsageError: alpha outside [1e-12, 1), or a confidence outside (0, 1 - 1e-9].
    """
    _check_alpha_range(alpha)
    n = max(1, math.ceil(1 / alpha) - 2)
    if confidence is not None:
        _check_confidence(confidence)
        n = max(n, math.ceil(math.log1p(-confidence) / math.log1p(-alpha)) - 1)
    while smallest_alpha(n, confidence) > alpha:  # settles the last unit, which rounding may hide
        n += 1
    return n


def smallest_alpha(n: int, confidence: float | None = None) -> float:
    """The smallest alpha at which n calibration images can flag anything: `p_table(n, C)[0]`."""
    _check_n(n)
    if confidence is None:
        return 1 / (n + 1)
    _check_confidence(confidence)
    return max(1 / (n + 1), -math.expm1(math.log1p(-confidence) / n))


def default_alpha(n: int, confidence: float | None = None) -> float:
    """0.01, or the smallest alpha that n allows where that is larger."""
    return max(DEFAULT_ALPHA, smallest_alpha(n, confidence))


def check_alpha(
    alpha: float, n: int, confidence: float | None = None, *, what: str = "alpha"
) -> float:
    """Return an alpha that was asked for, or say how many images are missing for it.

    A false discovery rate is held against the same rule: all m images of a batch at the smallest
    p-value are flagged only if that is at most Q.

    Args:
        alpha: the rate.
        n: calibration images.
        confidence: of the bundle's guarantee; None for the marginal one.
        what: what the rate is called in a message.

    Raises:
        UsageError: alpha outside [1e-12, 1).
        AlphaUnreachable: alpha below `smallest_alpha(n, confidence)`.
    """
    _check_alpha_range(alpha, what)
    needed = images_needed(alpha, confidence)
    if n < needed:
        at = "" if confidence is None else f" at confidence {confidence:g}"
        raise AlphaUnreachable(
            f"{what} {alpha:g} needs {needed} calibration images{at} and the bundle has {n}: "
            f"calibrate with {needed - n} more, or ask for "
            f"{round_up(smallest_alpha(n, confidence)):g} or above"
        )
    return alpha


def round_up(alpha: float) -> float:
    """An alpha in three significant digits, never rounded downwards: it can be asked for."""
    unit = 10.0 ** (math.floor(math.log10(alpha)) - 2)
    # As it will be printed, and so read again: a product with the unit may be an ulp off.
    nearest = float(f"{alpha:.3g}")
    return nearest if nearest >= alpha else float(f"{alpha + unit / 2:.3g}")


def false_alarm_band(
    alpha: float,
    n: int,
    m: int,
    *,
    coverage: float = 0.999,
    confidence: float | None = None,
) -> tuple[float, float]:
    """The equal-tailed band in which the rate of false alarms on m normal images falls.

    With l ranks flagged the count is BetaBinomial(m, l, n + 1 - l), because the calibration set
    is itself a draw. Ties make a system more careful and can only lower the count.

    Returns:
        (lowest, highest) rate, each in [0, 1].
    """
    _check_alpha_range(alpha)
    if m < 1:
        raise UsageError(f"a band of false alarms needs at least 1 test image, not {m}")
    flagged = int(np.searchsorted(p_table(n, confidence), alpha, side="right"))
    if flagged == 0:
        return 0.0, 0.0
    if flagged == n + 1:
        return 1.0, 1.0
    log_factorial = _log_factorials(n + m)
    k = np.arange(m + 1)
    a, b = flagged, n + 1 - flagged

    def log_beta(x: NDArray[np.int64] | int, y: NDArray[np.int64] | int) -> Floats:
        value: Floats = log_factorial[x - 1] + log_factorial[y - 1] - log_factorial[x + y - 1]
        return value

    choose = log_factorial[m] - log_factorial[k] - log_factorial[m - k]
    pmf = np.exp(choose + log_beta(k + a, m - k + b) - log_beta(a, b))
    tail = (1 - coverage) / 2
    lower = int(np.searchsorted(np.cumsum(pmf), tail, side="right"))
    upper = m - int(np.searchsorted(np.cumsum(pmf[::-1]), tail, side="right"))
    return lower / m, upper / m


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact confidence interval of a proportion seen as k of n.

    References:
        "The use of confidence or fiducial limits illustrated in the case of the binomial"
        (Clopper, Pearson, 1934)
    """
    if not 0 <= k <= n or n < 1:
        raise UsageError(f"a proportion needs 0 <= k <= n and n >= 1, not k={k}, n={n}")
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(_beta_quantile(tail, [k], [n - k + 1])[0])
    high = 1.0 if k == n else float(_beta_quantile(1 - tail, [k + 1], [n - k])[0])
    return low, high


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """The q-value of each p-value: flagging q <= Q bounds the expected share of false flags by Q.

    q_(i) = min over j >= i of m p_(j) / j. Conformal p-values that share one calibration set meet
    the condition of the bound (they are positively dependent).

    References:
        "Controlling the false discovery rate" (Benjamini, Hochberg, 1995)
        "Testing for outliers with conformal p-values" (Bates et al., 2023)
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * p.size / np.arange(1, p.size + 1)
    q = np.empty_like(p)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def ranks(p: ArrayLike, levels: Floats) -> NDArray[np.intp]:
    """Which of the levels, ascending, each p-value is: int (N,)."""
    return np.searchsorted(levels, np.asarray(p, np.float64))


def q_table(counts: NDArray[np.int64], levels: Floats) -> Floats:
    """The q-value of each rank, as `benjamini_hochberg` gives it, from a histogram of p-values.

    There are n + 1 possible p-values, or a few more where each class has its own, however many
    images: nothing is sorted, and memory does not grow with the batch.

    Args:
        counts: int64 (L,), how many p-values are at each level.
        levels: float64 (L,), ascending: the possible p-values.

    Returns:
        float64 (L,); a level that no p-value takes has the q-value of the next that one does.
    """
    below = np.cumsum(counts)
    scaled = np.ones_like(levels)
    there = counts > 0
    scaled[there] = levels[there] * below[-1] / below[there]
    return np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)


def fewest_flags(q: float, n: int, m: int, confidence: float | None = None) -> int:
    """The fewest of m images that Benjamini-Hochberg at q can flag, if any: ceil(m / (q (n + 1))).

    k flags take k p-values of at most q k / m, and none is below `smallest_alpha(n, confidence)`.
    More than m says that q is out of reach for n calibration images.

    Raises:
        UsageError: q outside [1e-12, 1).
    """
    _check_alpha_range(q, "a false discovery rate")
    smallest = smallest_alpha(n, confidence)
    flags = max(1, math.ceil(smallest * m / q) - 1)
    while smallest * m / flags > q:  # settles the last unit, which rounding may hide
        flags += 1
    return flags


def _check_n(n: int) -> None:
    if n < 1:
        raise UsageError(f"a conformal table needs at least 1 calibration image, not {n}")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence <= MOST_CONFIDENCE:
        raise UsageError(
            "confidence must lie between 0 and 1, and be at most 1 - 1e-9, not "
            f"{confidence!r}; try 0.95"
        )


def _check_alpha_range(alpha: float, what: str = "alpha") -> None:
    if not LEAST_ALPHA <= alpha < 1:
        raise UsageError(
            f"{what} must lie between 0 and 1, and be at least {LEAST_ALPHA:g}, not {alpha:g}; "
            "try 0.01"
        )


def _log_factorials(n: int) -> Floats:
    """log k! for k = 0..n."""
    return np.array([math.lgamma(k + 1.0) for k in range(n + 1)])


def _beta_quantile(q: float, a: ArrayLike, b: ArrayLike) -> Floats:
    """The x with P(Beta(a, b) <= x) = q, elementwise, by Newton steps kept inside a bracket."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    log_beta = _log_beta(a, b)
    low, high = np.zeros_like(a), np.ones_like(a)
    x = a / (a + b)
    for _ in range(100):
        excess = _beta_cdf(x, a, b, log_beta) - q
        low, high = np.where(excess < 0, x, low), np.where(excess < 0, high, x)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            density = np.exp((a - 1) * np.log(x) + (b - 1) * np.log1p(-x) - log_beta)
            step = x - excess / density
        done = np.abs(step - x) <= 1e-9 * x  # the next step would be lost in rounding
        inside = (step > low) & (step < high)
        x = np.where(inside | done, step, (low + high) / 2)
        if done.all():
            break
    result: Floats = x
    return result


def _log_beta(a: Floats, b: Floats) -> Floats:
    return np.array(
        [math.lgamma(s) + math.lgamma(t) - math.lgamma(s + t) for s, t in zip(a, b, strict=True)]
    )


def _beta_cdf(x: Floats, a: Floats, b: Floats, log_beta: Floats) -> Floats:
    """The regularised incomplete beta function, by its continued fraction where that is fast."""
    with np.errstate(divide="ignore"):
        front = np.exp(a * np.log(x) + b * np.log1p(-x) - log_beta)
    flip = x > (a + 1) / (a + b + 2)
    s, t, y = np.where(flip, b, a), np.where(flip, a, b), np.where(flip, 1 - x, x)
    tail = front * _continued_fraction(y, s, t) / s
    return np.where(flip, 1 - tail, tail)


def _continued_fraction(x: Floats, a: Floats, b: Floats) -> Floats:
    """Lentz's evaluation of the beta continued fraction; takes some sqrt(max(a, b)) rounds."""
    tiny = 1e-300
    c = np.ones_like(x)
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    h = d.copy()
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            change = c * d
            h *= change
        if np.all(np.abs(change - 1) < 1e-12):  # nearer, rounding may keep it away for long
            break
    return h


def _away_from_zero(x: Floats, tiny: float) -> Floats:
    return np.where(np.abs(x) < tiny, tiny, x)
