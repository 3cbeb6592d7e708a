"""What `evaluate --labels` finds: how good labels and rejections are, and those of a baseline.

The baseline is a softmax classifier that rejects by its maximum probability, the usual way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalyd.detect import bayes, conformal, selective

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["ClassRate", "Classification", "Labels", "Rates", "Said", "classification"]

COVERAGE = 0.999  # of the bands of false rejections, all classes together


@dataclass(frozen=True, eq=False)
class Said:
    """What a bundle says of one set of images.

    Attributes:
        posterior: float64 (N, K).
        p_value: float64 (N,); ones where nothing judges novelty.
        novel: bool (N,).
        ambiguous: bool (N,).
        credible: bool (N, K), the labels that cannot be ruled out.
    """

    posterior: Floats
    p_value: Floats
    novel: NDArray[np.bool_]
    ambiguous: NDArray[np.bool_]
    credible: NDArray[np.bool_]

    @property
    def confidence(self) -> Floats:
        """How far to trust the label: float64 (N,), in [0, 1]."""
        return bayes.confidence(self.posterior.max(axis=1), self.p_value)


@dataclass(frozen=True)
class Rates:
    """Shares of a set of images.

    Attributes:
        novel: rejected because they fit no class.
        ambiguous: rejected because they fit several.
    """

    novel: float
    ambiguous: float

    @classmethod
    def of(cls, said: Said) -> Rates:
        return cls(float(said.novel.mean()), float(said.ambiguous.mean()))

    @property
    def rejected(self) -> float:
        """Either."""
        return self.novel + self.ambiguous


@dataclass(frozen=True)
class ClassRate:
    """The normal images of one class.

    Attributes:
        n: how many.
        accuracy: share whose likeliest class is their own.
        coverage: share whose credible labels hold their own.
        novel: share called novel.
        at_most: what that share stays below in 99.9 % of runs, all classes together, if the
            promise holds.
    """

    n: int
    accuracy: float
    coverage: float
    novel: float
    at_most: float


@dataclass(frozen=True)
class Labels:
    """How good the labels of a set of normal images are.

    Attributes:
        accuracy: share whose likeliest class is their own.
        nll: mean -log p(y|x) of their own class, nats.
        ece: expected calibration error of the likeliest class's probability.
        aurc: area under the risk-coverage curve, accepted by probability.
        augrc: area under the generalized one.
        coverage_at_1pct_risk: share that can be accepted with 1 % of errors.
        mixed: name of outlier set -> (AURC, AUGRC) on as many outliers as normal images, each of
            which is an error when accepted.
        curves: coverage and risk, float64 each, of the normal images ("normal") and of each
            mixture, to be drawn.
    """

    accuracy: float
    nll: float
    ece: float
    aurc: float
    augrc: float
    coverage_at_1pct_risk: float
    mixed: dict[str, tuple[float, float]]
    curves: dict[str, tuple[Floats, Floats]]

    def to_dict(self) -> dict[str, Any]:
        """The keys that `evaluate --format json` prints."""
        mixed = {
            name: {"aurc": aurc, "augrc": augrc} for name, (aurc, augrc) in self.mixed.items()
        }
        own = {
            name: getattr(self, name)
            for name in ("accuracy", "nll", "ece", "aurc", "augrc", "coverage_at_1pct_risk")
        }
        return own | {"mixed": mixed}


@dataclass(frozen=True)
class Classification:
    """How a bundle labels and rejects.

    Attributes:
        labels: of the normal images.
        label_alpha: the level of the sets of credible labels.
        set_size: mean size of those sets.
        accepted: share of normal images that are given a label.
        accepted_accuracy: share of these labels that are right.
        normal: rejected shares of the normal images.
        outliers: name of set -> rejected shares.
        classes: name of class -> its normal images.
        baseline: the same measures of a softmax classifier; None without one.
        baseline_name: what it is called.
        approximate: the posterior rests on bounds.
    """

    labels: Labels
    label_alpha: float
    set_size: float
    accepted: float
    accepted_accuracy: float
    normal: Rates
    outliers: dict[str, Rates]
    classes: dict[str, ClassRate]
    baseline: Labels | None
    baseline_name: str | None
    approximate: bool

    def to_dict(self) -> dict[str, Any]:
        """The object under "classification"."""
        printed: dict[str, Any] = self.labels.to_dict() | {
            "approximate": self.approximate,
            "label_alpha": self.label_alpha,
            "set_size": self.set_size,
            "accepted": self.accepted,
            "accepted_accuracy": self.accepted_accuracy,
            "rejected": {
                name: {
                    "novel": rates.novel,
                    "ambiguous": rates.ambiguous,
                    "rejected": rates.rejected,
                }
                for name, rates in {"normal": self.normal, **self.outliers}.items()
            },
            "classes": {
                name: {
                    "n": each.n,
                    "accuracy": each.accuracy,
                    "coverage": each.coverage,
                    "novel": each.novel,
                    "novel_at_most": each.at_most,
                }
                for name, each in self.classes.items()
            },
        }
        if self.baseline is not None:
            printed["baseline"] = {"bundle": self.baseline_name} | self.baseline.to_dict()
        return printed


def classification(
    normal: Said,
    truth: NDArray[np.intp],
    outliers: Mapping[str, Said],
    *,
    classes: Sequence[str],
    counts: NDArray[np.int64],
    alpha: float,
    label_alpha: float,
    confidence: float | None,
    approximate: bool,
    baseline: tuple[str, Said, Mapping[str, Said]] | None = None,
) -> Classification:
    """Measure labels and rejections.

    Args:
        normal: what is said of N normal images.
        truth: intp (N,), their classes.
        outliers: name of set -> what is said of its images.
        classes: names of all K.
        counts: int64 (K,), calibration images of each.
        alpha: of novelty.
        label_alpha: of the sets of credible labels.
        confidence: of the bundle's guarantee.
        approximate: the posterior rests on bounds.
        baseline: name of a classifier, and what it says of the same images.
    """
    right = normal.posterior.argmax(axis=1) == truth
    accepted = ~(normal.novel | normal.ambiguous)
    covered = normal.credible[np.arange(len(truth)), truth]
    rates = {}
    for y, name in enumerate(classes):
        own = truth == y
        if own.any():
            _, at_most = conformal.false_alarm_band(
                alpha,
                int(counts[y]),
                int(own.sum()),
                coverage=1 - (1 - COVERAGE) / len(classes),
                confidence=confidence,
            )
            rates[name] = ClassRate(
                n=int(own.sum()),
                accuracy=float(right[own].mean()),
                coverage=float(covered[own].mean()),
                novel=float(normal.novel[own].mean()),
                at_most=at_most,
            )
    return Classification(
        labels=_labels(normal, truth, outliers),
        label_alpha=label_alpha,
        set_size=float(normal.credible.sum(axis=1).mean()),
        accepted=float(accepted.mean()),
        accepted_accuracy=float(right[accepted].mean()) if accepted.any() else 0.0,
        normal=Rates.of(normal),
        outliers={name: Rates.of(said) for name, said in outliers.items()},
        classes=rates,
        baseline=None if baseline is None else _labels(baseline[1], truth, baseline[2]),
        baseline_name=None if baseline is None else baseline[0],
        approximate=approximate,
    )


def _labels(normal: Said, truth: NDArray[np.intp], outliers: Mapping[str, Said]) -> Labels:
    best = normal.posterior.max(axis=1)
    wrong = normal.posterior.argmax(axis=1) != truth
    own = normal.posterior[np.arange(len(truth)), truth]

    # Confidence, what is wrong when accepted, and weights.
    mixtures: dict[str, tuple[Floats, NDArray[np.bool_], Floats]] = {}
    for name, strange in outliers.items():
        n, m = len(wrong), len(strange.p_value)
        mixtures[name] = (
            np.concatenate([normal.confidence, strange.confidence]),
            np.concatenate([wrong, np.ones(m, np.bool_)]),
            np.repeat([1 / n, 1 / m], [n, m]),
        )
    curves = {name: selective.errors(*given) for name, given in mixtures.items()}
    curves["normal"] = selective.errors(best, wrong)

    return Labels(
        accuracy=float(1 - wrong.mean()),
        nll=float(-np.log(np.maximum(own, np.finfo(np.float64).tiny)).mean()),
        ece=selective.calibration_error(best, wrong),
        aurc=selective.aurc(best, wrong),
        augrc=selective.augrc(best, wrong),
        coverage_at_1pct_risk=selective.coverage_at_risk(best, wrong),
        mixed={
            name: (selective.aurc(*given), selective.augrc(*given))
            for name, given in mixtures.items()
        },
        curves={name: (coverage, found / coverage) for name, (coverage, found) in curves.items()},
    )
