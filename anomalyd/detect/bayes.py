"""Bayes' rule with two ways out: a label, or the reason why there is none.

    log p(x|y) ── softmax(. / T + log p(y)) ──> posterior ──> credible labels ──> ambiguous?
                                                    └── p-value in each class ──> novel?
                                                score ──┘

    novel       fits no class: the p-value of every class is at most alpha
    ambiguous   fits several: not just one label is credible, or every label costs too much

The two promises are unlike and live apart. That of novelty: of the images of any one class at
most a share alpha is called novel. That of ambiguity: the set of credible labels holds the true
one in a share 1 - label_alpha of normal images. Neither says how often an accepted label is right.

References:
    "On Optimum Recognition Error and Reject Tradeoff" (Chow, 1970), for costs
    "Least Ambiguous Set-Valued Classifiers With Bounded Error Levels" (Sadinle, Lei, Wasserman,
    2019), for sets
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anomalyd.detect import conformal
from anomalyd.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

__all__ = [
    "AMBIGUOUS",
    "DEFAULT_LABEL_ALPHA",
    "DOUBT",
    "NOVEL",
    "Labelled",
    "Labelling",
    "check_priors",
    "class_scores",
    "confidence",
    "credible",
    "fit_temperature",
    "label",
    "log_posterior",
    "named_priors",
]

DEFAULT_LABEL_ALPHA = 0.1
DOUBT = 0.1
"""What new bundles add to a score in a class for each nat that another class is likelier by."""
NOVEL, AMBIGUOUS = "novel", "ambiguous"


@dataclass(frozen=True)
class Labelling:
    """What is asked of labels.

    Attributes:
        label_alpha: share of normal images whose credible labels may lack the true one, in (0, 1).
        reject_cost: what no label costs where a wrong one costs 1, in (0, 1); it takes the place
            of `label_alpha`. None goes by credible labels.
        priors: p(y) of each class where the images come from; None takes the bundle's.

    Raises:
        UsageError: a value outside (0, 1).
    """

    label_alpha: float = DEFAULT_LABEL_ALPHA
    reject_cost: float | None = None
    priors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, value in (("label-alpha", self.label_alpha), ("reject-cost", self.reject_cost)):
            if value is not None and not 0 < value < 1:
                raise UsageError(f"{name} must lie between 0 and 1, not {value:g}; try 0.1")


@dataclass(frozen=True, eq=False)
class Labelled:
    """What Bayes' rule says of N images.

    Attributes:
        posterior: float64 (N, K), each row summing to 1.
        label: intp (N,), the likeliest class, rejected or not.
        novel: bool (N,), fits no class.
        ambiguous: bool (N,), fits several, where it is not novel.
    """

    posterior: Floats
    label: NDArray[np.intp]
    novel: Flags
    ambiguous: Flags

    @property
    def rejected(self) -> Flags:
        """bool (N,): no label is given."""
        return self.novel | self.ambiguous


def log_posterior(
    log_likelihood: Floats, priors: Sequence[float] | None = None, temperature: float = 1.0
) -> Floats:
    """log p(y|x) = log softmax_y(log p(x|y) / T + log p(y)).

    The temperature makes up for likelihoods that count dependent evidence as independent; it acts
    here alone, never in bits per dimension, novelty or p(x).

    Args:
        log_likelihood: float64 (N, K), nats.
        priors: K probabilities; None for equal ones.
        temperature: T > 0.

    Returns:
        float64 (N, K), nats; exp of each row sums to 1. A row without one finite likelihood gives
        the priors back.
    """
    classes = log_likelihood.shape[1]
    log_priors = np.log(np.full(classes, 1 / classes) if priors is None else np.asarray(priors))
    # Infinite evidence would leave no number in its row.
    bounded = np.nan_to_num(log_likelihood, nan=-1e300, posinf=1e300, neginf=-1e300)
    joint = (bounded - bounded.max(axis=1, keepdims=True)) / temperature + log_priors
    result: Floats = joint - np.logaddexp.reduce(joint, axis=1, keepdims=True)
    return result


def class_scores(scores: Floats, log_posterior: Floats, doubt: float) -> Floats:
    """How strange each image is to each class: s + doubt (max_c log p(c|x) - log p(y|x)).

    In its likeliest class an image has the score itself. Without doubt one score stands for all
    classes, and a class whose own images are often odd would excuse every odd image.

    Args:
        scores: float64 (N,).
        log_posterior: float64 (N, K), nats.
        doubt: at least 0, for each nat.

    Returns:
        float64 (N, K), none below the image's score.
    """
    behind = log_posterior.max(axis=1, keepdims=True) - log_posterior
    result: Floats = scores[:, None] + doubt * behind
    return result


def fit_temperature(
    log_likelihood: Floats, labels: NDArray[np.int64], priors: Sequence[float] | None = None
) -> float:
    """The T > 0 under which the posterior gives labels the highest likelihood.

    Fitted where neither weights nor calibration look: on the validation split.

    Args:
        log_likelihood: float64 (N, K), nats, N >= 1.
        labels: int64 (N,), the classes.
        priors: as for `log_posterior`.

    References:
        "On Calibration of Modern Neural Networks" (Guo, Pleiss, Sun, Weinberger, 2017)
    """
    rows = np.arange(len(labels))

    def loss(log_t: float) -> float:
        found = log_posterior(log_likelihood, priors, math.exp(log_t))
        return -float(found[rows, labels].mean())

    # Convex in 1 / T, so unimodal in log T: shrink a bracket by the golden section.
    low, high, ratio = math.log(1e-2), math.log(1e4), (math.sqrt(5) - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    found = [loss(each) for each in inner]
    while high - low > 1e-4:
        if found[0] <= found[1]:
            high = inner[1]
            inner = [high - ratio * (high - low), inner[0]]
            found = [loss(inner[0]), found[0]]
        else:
            low = inner[0]
            inner = [inner[1], low + ratio * (high - low)]
            found = [found[1], loss(inner[1])]
    return math.exp((low + high) / 2)


def credible(posterior: Floats, label_scores: Floats, label_alpha: float) -> Flags:
    """Which labels cannot be ruled out: 1 - p(y|x) is no stranger than at true labels.

    A label is kept where (1 + #{calibration 1 - p(true|x) >= 1 - p(y|x)}) / (n + 1) is above
    label_alpha; then the true label of a normal image is kept in a share 1 - label_alpha at
    least, on average over calibration sets.

    Args:
        posterior: float64 (N, K).
        label_scores: float64 (n,), ascending: 1 - p(true|x) of the calibration split.
        label_alpha: in (0, 1).

    Returns:
        bool (N, K); a row is empty where the posterior is spread over many labels.

    References:
        "Algorithmic Learning in a Random World" (Vovk, Gammerman, Shafer, 2005)
    """
    table = conformal.p_table(len(label_scores))
    p_values = conformal.p_values((1 - posterior).ravel(), label_scores, table)
    kept: Flags = (p_values > label_alpha).reshape(posterior.shape)
    return kept


def label(
    log_likelihood: Floats,
    novel: Flags,
    asked: Labelling,
    *,
    priors: Sequence[float] | None,
    temperature: float,
    label_scores: Floats,
) -> Labelled:
    """Label N images, or say why not.

    Args:
        log_likelihood: float64 (N, K), nats.
        novel: bool (N,), the images that fit no class.
        asked: what is asked of labels.
        priors: the bundle's; `asked` may have others.
        temperature: of the posterior.
        label_scores: as for `credible`.
    """
    posterior = np.exp(log_posterior(log_likelihood, asked.priors or priors, temperature))
    best = posterior.argmax(axis=1)
    if asked.reject_cost is not None:
        # The expected cost of the best label is the chance that it is wrong.
        unsure = 1 - posterior.max(axis=1) > asked.reject_cost
    else:
        # None at all: the posterior is spread so thinly that no label alone is credible.
        unsure = credible(posterior, label_scores, asked.label_alpha).sum(axis=1) != 1
    return Labelled(posterior, best, novel, unsure & ~novel)


def confidence(probability: Floats, p_value: Floats) -> Floats:
    """How far to trust a label: p(y|x) 2 / (1 + 1/B), B = -e p log p where p < 1/e, else 1.

    1 / (1 + 1/B) is the least probability that the image is normal, if half of all images are:
    a small p-value says less against it than it seems to. It orders images for acceptance and is
    no verdict.

    Args:
        probability: float64 (N,), of the label.
        p_value: float64 (N,), in (0, 1].

    Returns:
        float64 (N,), in [0, 1].

    References:
        "Calibration of p Values for Testing Precise Null Hypotheses" (Sellke, Bayarri, Berger,
        2001)
    """
    small = np.minimum(p_value, math.exp(-1))
    bound = -math.e * small * np.log(small)
    trust: Floats = probability * 2 * bound / (1 + bound)
    return trust


def named_priors(texts: Iterable[str]) -> dict[str, float]:
    """Class -> probability, of texts like `sandal=0.2`.

    Raises:
        UsageError: another form, or a class that is named twice.
    """
    priors: dict[str, float] = {}
    for text in texts:
        # A class may have = in its name, a number has none.
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = None
        if not (name and equals) or value is None:
            raise UsageError(f"prior {text}: say NAME=P, as in sandal=0.2")
        if name in priors:
            raise UsageError(f"prior {name}: given twice")
        priors[name] = value
    return priors


def check_priors(given: Mapping[str, float], classes: Sequence[str]) -> tuple[float, ...]:
    """Priors in the order of the classes.

    Args:
        given: class -> probability.
        classes: the names of all.

    Raises:
        UsageError: a class that is missing or unknown, a probability outside (0, 1), or a sum
            other than 1.
    """
    for name in given:
        if name not in classes:
            raise UsageError(f"prior {name}: no such class; there are {', '.join(classes)}")
    missing = [name for name in classes if name not in given]
    if missing:
        raise UsageError(f"prior: none for {', '.join(missing)}; give one for every class")
    for name, value in given.items():
        if not 0 < value < 1:
            raise UsageError(f"prior {name}={value:g} must lie between 0 and 1")
    total = math.fsum(given.values())
    if abs(total - 1) > 1e-6:
        raise UsageError(f"prior: the priors sum to {total:g}; they must sum to 1")
    return tuple(given[name] / total for name in classes)
