"""A small convolutional classifier, from scratch or from the encoder of another model."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import ImageShape, Model
from anomalyd.density.encoder import Encoder

__all__ = ["Classified", "Classifier"]


class Classified(NamedTuple):
    """What a classifier says of N images.

    Attributes:
        log_posterior: (N, K) float32, nats: log p(y|x).
        statistics: (N, S) float32, in the order of `Classifier.statistics`.
        embedding: (N, E) float32, what the classes are told apart by.
    """

    log_posterior: Tensor
    statistics: Tensor
    embedding: Tensor


class Classifier(Model):
    """p(y|x) = softmax(W e(x) + b), e an `Encoder` and one hidden layer on its features and code.

    Training shifts and mirrors images and drops features at random; nothing else does.

    References:
        Gradient-Based Learning Applied to Document Recognition (LeCun et al., 1998);
        Layer Normalization (Ba, Kiros, Hinton, 2016).

    Args:
        shape: the image shape, at least 4x4.
        classes: K, at least 2.
        features: channels at half the resolution, doubled at a quarter.
        latent: dimensions of the encoder's code.
        hidden: dimensions E of e(x).
        dropout: share of the features, and of e(x), that a training step drops.
        shift: pixels by which training moves an image, at most, either way.
        mirror: whether training mirrors every other image, left to right.

    Raises:
        ValueError: fewer than two classes.
    """

    kind = "classifier"
    unit = "nats"
    statistics = ("max_probability", "entropy")
    units = ("1", "nats")
    edges = ("out",)

    def __init__(
        self,
        shape: ImageShape,
        classes: int = 0,
        *,
        features: int = 16,
        latent: int = 32,
        hidden: int = 128,
        dropout: float = 0.3,
        shift: int = 1,
        mirror: bool = False,
    ) -> None:
        super().__init__(shape, classes)
        if classes < 2:
            raise ValueError(
                f"a classifier needs at least 2 classes, not {classes}; give --labels and images "
                "of several classes"
            )
        self.dropout, self.shift, self.mirror = dropout, shift, mirror
        self.encoder = Encoder(shape, features, latent)
        size = self.encoder.size + latent
        self.norm = nn.LayerNorm(size)
        self.hidden = nn.Linear(size, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Classified:
        """Classify `images`, uint8 (N, H, W, C)."""
        embedding, logits = self._classify(images)
        log_posterior = F.log_softmax(logits, dim=1)
        posterior = log_posterior.exp()
        entropy = -(posterior * log_posterior).sum(dim=1)
        return Classified(
            log_posterior=log_posterior,
            statistics=torch.stack([posterior.amax(dim=1), entropy], dim=1),
            embedding=embedding,
        )

    def loss(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy in nats, of images shifted and mirrored at random."""
        return self.losses(self._augmented(images) if self.training else images, labels).mean()

    def losses(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return -log p(y|x) of each image in nats: (N,).

        Raises:
            ValueError: there are no labels.
        """
        if labels is None:
            raise ValueError("a classifier learns from labels, int64 (N,), not None")
        return F.cross_entropy(self._classify(images)[1], labels, reduction="none")

    def _classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return e(x), (N, E), and the logits, (N, K)."""
        x = torch.cat(self.encoder(self.centred(self.quantise(images))), dim=1)
        x = F.dropout(self.norm(x), self.dropout, self.training)
        embedding = F.relu(self.hidden(x))
        return embedding, self.out(F.dropout(embedding, self.dropout, self.training))

    def _augmented(self, images: Tensor) -> Tensor:
        """Move each image by up to `shift` pixels, its edge repeated, and mirror half of them."""
        n, height, width, _ = images.shape
        device = images.device
        by = torch.randint(-self.shift, self.shift + 1, (2, n, 1), device=device)
        rows = (torch.arange(height, device=device) + by[0]).clamp(0, height - 1)
        columns = (torch.arange(width, device=device) + by[1]).clamp(0, width - 1)
        if self.mirror:
            turned = torch.rand(n, 1, device=device) < 0.5
            columns = torch.where(turned, width - 1 - columns, columns)
        every = torch.arange(n, device=device)[:, None, None]
        return images[every, rows[:, :, None], columns[:, None]]
