"""A classifier and an unconditional density, joined by Bayes' rule into p(x|y)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from anomalyd.density.base import Density, Scores
from anomalyd.density.classifier import Classifier

__all__ = ["Composed"]


class Composed(Density):
    """log p(x|y) = log p(y|x) + log p(x) - log p(y), each part trained already.

    Summed over y with p(y) it is p(x) again, and its posterior is the classifier's. p(x|y) is
    normalised as far as p(y) is the share of y among images drawn from p(x): it stands for it as
    the share in the classifier's training images.

    It does not draw images: p(x|y) would have to be drawn from p(x) by rejection.

    Args:
        density: p(x), with its companions.
        classifier: p(y|x).
        priors: p(y), K probabilities; None for equal ones, until weights are loaded.
    """

    log_prior: Tensor
    draws = False

    def __init__(
        self, density: Density, classifier: Classifier, priors: Sequence[float] | None = None
    ) -> None:
        classes = classifier.classes
        super().__init__(density.shape, classes)
        self.density, self.classifier = density, classifier
        self.likelihood = density.likelihood
        self.statistics = (*density.statistics, *classifier.statistics)
        self.units = (*density.units, *classifier.units)
        shares = torch.tensor(priors or [1 / classes] * classes, dtype=torch.float64)
        self.register_buffer("log_prior", torch.log(shares).float())

    def forward(self, images: Tensor) -> Scores:
        """Score `images`, uint8 (N, H, W, C), in one pass of each part."""
        scores, said = self.density(images), self.classifier(images)
        return cast("Scores", scores)._replace(
            log_likelihood=scores.log_likelihood + said.log_posterior - self.log_prior,
            statistics=torch.cat([scores.statistics, said.statistics], dim=1),
            embedding=said.embedding,
        )

    def is_edge(self, name: str) -> bool:
        """Tell of a parameter what the part that it belongs to says."""
        part, _, rest = name.partition(".")
        return bool(getattr(self, part).is_edge(rest))
