"""How well a bundle tells outliers from normal images, with what chance alone would do beside it.

Outliers are the positive class everywhere, and higher scores are stranger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalyd.detect import conformal
from anomalyd.detect.pipeline import Collected, collect
from anomalyd.detect.statistics import finite
from anomalyd.errors import SourceError, UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from anomalyd.detect.detector import Detector
    from anomalyd.sources import Item, Source

    Floats = NDArray[np.float64]

__all__ = ["Evaluated", "FalseAlarms", "OutlierSet", "auroc", "evaluate", "fpr95", "sample"]

SEEN_LIMIT = 0.01  # share of images that training or calibration may have seen
DIGITS = 6


@dataclass(frozen=True)
class FalseAlarms:
    """Normal images that were flagged.

    Attributes:
        alpha: the rate asked for.
        observed: the rate seen, in [0, 1].
        n: normal images.
        band: where 99.9 % of such rates fall if the promise holds.
    """

    alpha: float
    observed: float
    n: int
    band: tuple[float, float]


@dataclass(frozen=True)
class OutlierSet:
    """One set of outliers against the normal images.

    Attributes:
        n: outliers.
        auroc: probability that an outlier scores above a normal image, ties half.
        fpr95: rate of false alarms where 95 % of the outliers are caught.
        recall: share flagged at alpha.
        recall_ci95: its exact 95 % confidence interval.
        scores: AUROC by every score of the bundle.
    """

    n: int
    auroc: float
    fpr95: float
    recall: float
    recall_ci95: tuple[float, float]
    scores: dict[str, float]


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found.

    Attributes:
        bundle: name of the bundle.
        score: name of the score that verdicts rest on.
        likelihood: "exact", or the bound that `bits_per_dim` rests on.
        n: normal images.
        bits_per_dim: mean over the normal images.
        false_alarms: among the normal images.
        outliers: name of set -> result.
        seen: name of set -> images dropped because training or calibration has seen them.
        unreadable: (name, reason) of what could not be read.
    """

    bundle: str
    score: str
    likelihood: str
    n: int
    bits_per_dim: float
    false_alarms: FalseAlarms
    outliers: dict[str, OutlierSet]
    seen: dict[str, list[str]]
    unreadable: list[tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """The object that `evaluate --format json` prints."""
        alarms = self.false_alarms
        sets = self.outliers.items()
        scores = next((list(result.scores) for result in self.outliers.values()), [self.score])
        return {
            "bundle": self.bundle,
            "score": self.score,
            "likelihood": self.likelihood,
            "n": self.n,
            "bits_per_dim": _round(self.bits_per_dim),
            "false_alarm_rate": {
                "alpha": alarms.alpha,
                "observed": _round(alarms.observed),
                "n": alarms.n,
                "band": [_round(end) for end in alarms.band],
            },
            "auroc": {name: _round(result.auroc) for name, result in sets},
            "fpr95": {name: _round(result.fpr95) for name, result in sets},
            "recall": {
                name: {
                    "alpha": alarms.alpha,
                    "value": _round(result.recall),
                    "ci95": [_round(end) for end in result.recall_ci95],
                }
                for name, result in sets
            },
            "scores": {
                score: {"auroc": {name: _round(result.scores[score]) for name, result in sets}}
                for score in scores
            },
        }


def evaluate(
    detector: Detector,
    normal: Source,
    outliers: Mapping[str, Source],
    *,
    alpha: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Evaluated:
    """Score normal images and sets of outliers, and compare.

    Args:
        detector: the bundle.
        normal: images that should not be flagged.
        outliers: name of set -> images that should be.
        alpha: rate of false alarms; None takes the bundle's default.
        limit: take a random sample of this many images of each set.
        seed: of those samples.
        progress: called with the number of images done.

    Raises:
        SourceError: a set with nothing readable in it, or more than 1 % of it seen before.
        AlphaUnreachable: an alpha that the calibration set is too small for.
    """
    level = detector.alpha(alpha)
    seen: dict[str, list[str]] = {}
    unreadable: list[tuple[str, str]] = []

    def scores_of(name: str, source: Source) -> Collected:
        items = sample(source, limit, seed)
        collected = collect(
            detector.session, detector.spec, items, texture=detector.texture, progress=progress
        )
        if collected is None:
            raise SourceError(f"{name} {source.name}: none of its images can be read")
        unreadable.extend((at, str(error)) for at, error in collected.errors)
        kept, seen[name] = _drop_seen(detector, collected, f"{name} {source.name}")
        return kept

    normals = scores_of("normal", normal)
    judged = detector.columns(normals.raw, level)
    normal_scores = _all_scores(detector, normals)
    results = {}
    for name, source in outliers.items():
        strange = scores_of(name, source)
        flagged = detector.columns(strange.raw, level).outlier
        by_score = _all_scores(detector, strange)
        verdict = detector.manifest.score_name
        results[name] = OutlierSet(
            n=len(strange),
            auroc=auroc(normal_scores[verdict], by_score[verdict]),
            fpr95=fpr95(normal_scores[verdict], by_score[verdict]),
            recall=float(flagged.mean()),
            recall_ci95=conformal.clopper_pearson(int(flagged.sum()), len(strange)),
            scores={score: auroc(normal_scores[score], by_score[score]) for score in by_score},
        )
    return Evaluated(
        bundle=detector.manifest.name,
        score=detector.manifest.score_name,
        likelihood=detector.manifest.likelihood,
        n=len(normals),
        bits_per_dim=float(np.mean(judged.bits_per_dim)),
        false_alarms=FalseAlarms(
            alpha=level,
            observed=float(judged.outlier.mean()),
            n=len(normals),
            band=conformal.false_alarm_band(
                level,
                detector.manifest.calibration_n,
                len(normals),
                confidence=detector.confidence,
            ),
        ),
        outliers=results,
        seen=seen,
        unreadable=unreadable,
    )


def auroc(normal: ArrayLike, outliers: ArrayLike) -> float:
    """P(outlier > normal) + P(outlier = normal) / 2 over all pairs.

    Args:
        normal: (N,) scores, N >= 1.
        outliers: (M,) scores, M >= 1.
    """
    ordered = np.sort(np.asarray(normal, np.float64))
    outliers = np.asarray(outliers, np.float64)
    below = np.searchsorted(ordered, outliers, side="left")
    upto = np.searchsorted(ordered, outliers, side="right")
    return float((below.sum() + upto.sum()) / (2 * ordered.size * outliers.size))


def fpr95(normal: ArrayLike, outliers: ArrayLike) -> float:
    """The share of normal images flagged by the highest threshold that flags 95 % of outliers.

    "Flagged" is score >= threshold; arguments as for `auroc`.
    """
    descending = np.sort(np.asarray(outliers, np.float64))[::-1]
    threshold = descending[math.ceil(0.95 * descending.size) - 1]
    return float(np.mean(np.asarray(normal, np.float64) >= threshold))


def sample(source: Source, limit: int | None, seed: int) -> Iterator[Item]:
    """A random sample of a source without replacement, in its order, read as it goes by.

    Args:
        source: the images.
        limit: how many; None, or more than there are, takes all.
        seed: the same seed takes the same images.

    Raises:
        UsageError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}")
    count = len(source)
    if limit is None or limit >= count:
        return iter(source)
    chosen = np.random.default_rng(seed).choice(count, limit, replace=False)
    return _picked(source, np.sort(chosen).tolist())


def _picked(source: Source, places: list[int]) -> Iterator[Item]:
    remaining = iter(places)
    wanted = next(remaining, None)
    for place, item in enumerate(source):
        if place == wanted:
            yield item
            wanted = next(remaining, None)
            if wanted is None:
                return


def _drop_seen(
    detector: Detector, collected: Collected, subject: str
) -> tuple[Collected, list[str]]:
    """Without the images that training or calibration has seen, and the names of those."""
    calibration = detector.calibration
    known = np.concatenate([calibration.training_hashes, calibration.calibration_hashes])
    seen = np.isin(collected.hashes, known)
    names = [collected.names[i] for i in np.flatnonzero(seen)]
    if len(names) > SEEN_LIMIT * len(collected):
        raise SourceError(
            f"{subject}: {len(names)} of {len(collected)} images were seen in training or "
            f"calibration, such as {names[0]}, and at most 1 % may be; give images kept apart"
        )
    return collected[~seen], names


def _all_scores(detector: Detector, collected: Collected) -> dict[str, Floats]:
    """The verdict's score, the plain likelihood and every statistic, by name."""
    raw = collected.raw
    statistics = {
        name: finite(raw.statistics[:, column].astype(np.float64))
        for column, name in enumerate(detector.manifest.statistics)
    }
    verdict = detector.columns(raw, detector.manifest.default_alpha).score
    return {detector.manifest.score_name: verdict, "nll": detector.nll(raw)} | {
        name: values for name, values in statistics.items() if name != detector.manifest.score_name
    }


def _round(value: float) -> float:
    return round(value, DIGITS)
