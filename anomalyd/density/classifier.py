"""A small convolutional classifier, from scratch or from the encoder of another model."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import ImageShape, Model
from anomalyd.density.encoder import Encoder
from anomalyd.density.jitter import jittered

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

    Training shifts and mirrors images and drops features at random. With `mirror`, where an image
    and its reflection have one class, logits are the mean of both; training learns one at a time.

    References:
        Gradient-Based Learning Applied to Document Recognition (LeCun et al., 1998);
        Layer Normalization (Ba, Kiros, Hinton, 2016).

    Args:
        shape: the image shape, at least 4x4.
        classes: K, at least 2.
        features: channels at half the resolution, doubled at a quarter.
        latent: dimensions of the encoder's code.
        blocks: residual blocks of the encoder at either resolution.
        hidden: dimensions E of e(x).
        dropout: share of the features, and of e(x), that a training step drops.
        shift: pixels by which training moves an image, at most, either way.
        mirror: whether a reflection, left to right, changes no class.

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
        blocks: int = 0,
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
        self.encoder = Encoder(shape, features, latent, blocks)
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
        if self.training:
            images = jittered(images, self.shift, mirror=self.mirror)
        return self.losses(images, labels).mean()

    def losses(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return -log p(y|x) of each image in nats: (N,).

        Raises:
            ValueError: there are no labels.
        """
        if labels is None:
            raise ValueError("a classifier learns from labels, int64 (N,), not None")
        return F.cross_entropy(self._classify(images)[1], labels, reduction="none")

    def _classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.centred(self.quantise(images))
        return self.noisy_logits(inputs) if self.training else self.logits(inputs)

    def logits(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, C, H, W) in [-1, 1] to e(x), (N, E), and the logits, (N, K)."""
        embedding, logits = self._once(inputs, 0.0)
        if self.mirror:
            logits = (logits + self._once(inputs.flip(3), 0.0)[1]) / 2
        return embedding, logits

    def noisy_logits(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same with features dropped, of the image as it is."""
        return self._once(inputs, self.dropout)

    def _once(self, inputs: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        x = torch.cat(self.encoder(inputs), dim=1)
        embedding = F.relu(self.hidden(F.dropout(self.norm(x), dropout)))
        return embedding, self.out(F.dropout(embedding, dropout))
