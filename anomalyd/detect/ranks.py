"""From raw scores of the fit and calibration splits to the ranks that p-values are read off.

Training, `calibrate` and `compose` all fill `calibration.npz` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalyd.detect import conformal
from anomalyd.detect.bayes import class_scores, log_posterior
from anomalyd.errors import CalibrationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ranks", "ranks_by_class"]


def ranks(scores: NDArray[np.float64], confidence: float | None) -> dict[str, Any]:
    """`scores` and `p_table` of a calibration split.

    Args:
        scores: float64 (n,), in any order.
        confidence: of the guarantee; None for the marginal one.
    """
    table = conformal.p_table(len(scores), confidence)
    return {"scores": np.sort(scores), "p_table": table}


def ranks_by_class(
    scores: NDArray[np.float64],
    log_likelihood: NDArray[np.float64],
    labels: NDArray[np.int64],
    *,
    classes: Sequence[str],
    priors: Sequence[float] | None,
    temperature: float,
    doubt: float,
    confidence: float | None = None,
) -> dict[str, Any]:
    """The arrays of a calibration split whose images have classes.

    Args:
        scores: float64 (n,).
        log_likelihood: float64 (n, K), nats, of the same images.
        labels: int64 (n,), their classes.
        classes: names of all K.
        priors: p(y).
        temperature: of the posterior.
        doubt: as for `class_scores`.
        confidence: of the guarantee, class by class; None for the marginal one.

    Raises:
        CalibrationError: a class without an image.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if not counts.all():
        raise CalibrationError(
            f"class {classes[int(counts.argmin())]}: no calibration image of it, and each of the "
            f"{len(classes)} classes needs {conformal.images_needed(conformal.DEFAULT_ALPHA)} for "
            f"an alpha of {conformal.DEFAULT_ALPHA}; give more labelled images"
        )
    posterior = log_posterior(log_likelihood, priors, temperature)
    true = np.arange(len(labels)), labels
    own = class_scores(scores, posterior, doubt)[true]
    tables = [ranks(own[labels == y], confidence) for y in range(len(classes))]
    truths = 1 - np.exp(posterior[true])
    return {
        "scores": np.concatenate([table["scores"] for table in tables]),
        "p_table": np.concatenate([table["p_table"] for table in tables]),
        "class_counts": counts,
        "label_scores": np.sort(np.clip(truths, 0, 1)),
    }
