"""What CARD.md says of a bundle's calibration, and how a new calibration changes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.detect.bundle import Manifest

__all__ = ["SCORES", "STRANGEST", "VERDICT", "histogram", "promise", "recalibrated"]

VERDICT = "What its verdict means"
SCORES = "Scores of the calibration images"
STRANGEST = "Strangest held-out normal images"


def promise(manifest: Manifest) -> str:
    """Return the paragraph on when an image is an outlier, and how many false alarms there are."""
    over, confidence = "on average over calibration sets", manifest.guarantee["confidence"]
    if confidence is not None:
        over = f"with confidence {confidence:g} over the calibration set drawn"
    return (
        f"An image is an outlier at alpha = {manifest.default_alpha:g} if its score, "
        f"`{manifest.score_name}`, is stranger than that of all but a share alpha of "
        f"{manifest.calibration_n:,} held-out normal images. The rate of false alarms is then at "
        f"most alpha, {over}, if live normal images are exchangeable with the calibration images. "
        "After a change of camera, light or product they are not: run `anomalyd calibrate` on new "
        "normal images."
    )


def recalibrated(
    card: str,
    manifest: Manifest,
    scores: NDArray[np.float64],
    threshold: float | None,
    source: str,
) -> str:
    """Return a card that tells of a new calibration, and for the rest what it told before.

    Args:
        card: as it was; sections that it lacks, as one written by hand may, are added at its end.
        manifest: with the new calibration.
        scores: of the new calibration images, ascending.
        threshold: the smallest score that is an outlier; None: none is.
        source: the name of those images.
    """
    drawn = f"{manifest.calibration_n:,} images of `{source}`, by `anomalyd calibrate`."
    head, *sections = f"\n{card.rstrip()}".split("\n## ")
    told = dict(section.partition("\n")[::2] for section in sections)
    # The first paragraph is the promise; what the score is and what labels mean stays.
    _, _, rest = told.get(VERDICT, "").lstrip("\n").partition("\n\n")
    told[VERDICT] = f"\n{promise(manifest)}\n" + (f"\n{rest}" if rest else "")
    told[SCORES] = f"\n{drawn}\n\n{histogram(scores, threshold)}\n"
    parts = [head]
    for title, text in told.items():
        whose = " of its training" if title == STRANGEST else ""
        parts.append(f"{title}{whose}\n{text.rstrip()}\n")
    return "\n## ".join(parts).lstrip("\n")


def histogram(scores: NDArray[np.float64], threshold: float | None, *, bins: int = 20) -> str:
    """Draw scores as a block of rows, a bar chart, with the line where outliers begin.

    Args:
        scores: ascending.
        threshold: the smallest score that is an outlier, where a bin ends; None draws no line.
        bins: rows up to the largest score or the threshold, about.
    """
    line = float(np.quantile(scores, 0.99)) if threshold is None else threshold
    bottom = min(0.0, float(scores[0]), line - 1e-9)
    top = float(min(max(scores[-1], line), 2 * max(line, 1e-9)))
    below = max(1, round(bins * (line - bottom) / (top - bottom)))
    step = (line - bottom) / below
    above = max(math.ceil((top - line) / step - 1e-9), int(scores[-1] >= line))
    edges = line + step * np.arange(-below, above + 1)
    counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
    widest = max(1, int(counts.max()))
    rows = [
        f"{low:7.3f} to {high:6.3f} {'#' * round(40 * int(count) / widest)} {count}"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    if threshold is not None:
        rows.insert(below, f"{'-' * 12} outlier from {threshold:.4f} {'-' * 28}")
    return "\n".join(["```", *rows, "```"])
