"""How good labels are, and how well a confidence tells which of them to trust.

Images are accepted from the most confident down. Every function takes N confidences (higher is
surer) and N flags of what is wrong when accepted: a wrong label, or any label of an outlier.
Images whose confidences tie are accepted in shares, so that their order does not matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

__all__ = ["augrc", "aurc", "calibration_error", "coverage_at_risk", "errors"]

BINS = 15


def errors(
    confidence: Floats, wrong: Flags, weights: Floats | None = None
) -> tuple[Floats, Floats]:
    """The risk-coverage curve before it is divided: what is accepted, and what of it is wrong.

    Args:
        confidence: float64 (N,), N >= 1.
        wrong: bool (N,).
        weights: float64 (N,), what each image counts for; None for equal ones.

    Returns:
        coverage and errors, float64 (N,) each, in [0, 1]: shares of all images once the first 1,
        2, ..., N are accepted.
    """
    share = np.full(len(wrong), 1.0) if weights is None else np.asarray(weights, np.float64)
    share = share / share.sum()
    order = np.argsort(-confidence, kind="stable")
    coverage, found = np.cumsum(share[order]), np.cumsum((share * wrong)[order])
    ranked = confidence[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    # Among ties, errors come at the rate that they have there.
    at, of = np.append(0.0, coverage[ends]), np.append(0.0, found[ends])
    return coverage, np.interp(coverage, at, of)


def aurc(confidence: Floats, wrong: Flags, weights: Floats | None = None) -> float:
    """The area under the risk-coverage curve: the mean share of errors among the accepted.

    References:
        "Selective Classification for Deep Neural Networks" (Geifman, El-Yaniv, 2017)
    """
    coverage, found = errors(confidence, wrong, weights)
    return float(np.sum(np.diff(coverage, prepend=0.0) * found / coverage))


def augrc(confidence: Floats, wrong: Flags, weights: Floats | None = None) -> float:
    """The area under the generalized risk-coverage curve: the mean share of accepted errors.

    Of all images, not of those accepted so far: at most 1/2.

    References:
        "Overcoming Common Flaws in the Evaluation of Selective Classification Systems" (Traub et
        al., 2024)
    """
    coverage, found = errors(confidence, wrong, weights)
    return float(np.sum(np.diff(coverage, prepend=0.0) * found))


def coverage_at_risk(confidence: Floats, wrong: Flags, risk: float = 0.01) -> float:
    """The largest share of images that can be accepted with at most a share `risk` of errors."""
    coverage, found = errors(confidence, wrong)
    fine = found <= risk * coverage + 1e-12  # of rounding
    return float(coverage[fine].max(initial=0.0))


def calibration_error(confidence: Floats, wrong: Flags, bins: int = BINS) -> float:
    """The expected calibration error: sum over bins of their share |accuracy - confidence|.

    Args:
        confidence: float64 (N,), the probability of the label given, in [0, 1].
        wrong: bool (N,).
        bins: of equal width.

    References:
        "Obtaining Well Calibrated Probabilities Using Bayesian Binning" (Naeini, Cooper,
        Hauskrecht, 2015)
    """
    place = np.minimum((confidence * bins).astype(np.intp), bins - 1)
    gaps = np.bincount(place, weights=confidence - ~wrong, minlength=bins)
    return float(np.abs(gaps).sum() / len(wrong))
