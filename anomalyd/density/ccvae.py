"""A variational autoencoder whose code keeps what tells classes apart in a place of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from anomalyd.density.base import ImageShape
from anomalyd.density.classifier import Classifier
from anomalyd.density.encoder import Decoder, Encoder
from anomalyd.density.likelihoods import likelihood
from anomalyd.density.precision import precise
from anomalyd.density.variational import Gaussian, Layer, Variational, bounded

__all__ = ["CCVAE"]

CONFIDENT = 10.0
"""How far a classifier's logits are apart where it is sure; at first, classes are as far."""


class CCVAE(Variational):
    """log p(x|y) >= E_q[log p(x|w, z)] - KL(q(w|x) || p(w|y)) - KL(q(z|x) || N(0, I)).

    w has a dimension for each class: q(w|x) = N(a l(x), diag sigma^2), l the logits of a network
    of its own, the labeller, and p(w|y) = N(mu_y, diag sigma_y^2). z is what else there is to an
    image. At first the posterior by Bayes' rule, p(y|x) ~ p(y) exp(-KL(q(w|x) || p(w|y))), is
    softmax(l(x) + log p(y)).

    The bound moves the labeller in nothing: it learns from labels alone (`[train] bayes`), or is
    a classifier that was trained before (`--init`). So telling classes apart costs the density
    next to nothing, and the bounds of all classes cost one pass of each network.

    References:
        Capturing Label Characteristics in VAEs (Joy, Schmon, Torr, Siddharth, Rainforth, 2021).

    Args:
        shape: the image shape, at least 4x4.
        classes: K, at least 2.
        features: channels at half the resolution, doubled at a quarter.
        latent: dimensions of z.
        blocks: residual blocks of the encoder of z at either resolution.
        outputs: channels at full resolution, which the distribution of a pixel reads.
        pixel: the distribution of one pixel, a name in `likelihoods`.
        components: logistics in the mixture, where that is chosen.
        bound: `elbo` or `iwae`.
        samples: S, noise vectors in the bank.
        label_features: `features` of the labeller, a `Classifier`; `label_latent`, `label_blocks`
            and `label_hidden` are its `latent`, `blocks` and `hidden`, `dropout` and `mirror` its
            own.

    Raises:
        ValueError: fewer than two classes.
    """

    edges = ("prior", "pixel", "scale", "log_sigma_w")

    def __init__(
        self,
        shape: ImageShape,
        classes: int = 0,
        *,
        features: int = 16,
        latent: int = 32,
        blocks: int = 0,
        outputs: int = 8,
        pixel: str = "logistic-mixture",
        components: int = 3,
        bound: str = "elbo",
        samples: int = 1,
        label_features: int = 16,
        label_latent: int = 32,
        label_blocks: int = 0,
        label_hidden: int = 128,
        dropout: float = 0.3,
        mirror: bool = False,
    ) -> None:
        super().__init__(shape, classes, (classes, latent), bound, samples)
        self.labeller = Classifier(
            shape,
            classes,
            features=label_features,
            latent=label_latent,
            blocks=label_blocks,
            hidden=label_hidden,
            dropout=dropout,
            mirror=mirror,
        )
        apart = math.sqrt(CONFIDENT)
        self.scale = nn.Parameter(torch.full((classes,), 1 / apart))
        self.log_sigma_w = nn.Parameter(torch.zeros(classes))
        # Mean and log standard deviation of each class.
        self.prior = nn.Parameter(
            torch.cat([apart * torch.eye(classes), torch.zeros(classes, classes)], dim=1)
        )
        self.encoder = Encoder(shape, features, latent, blocks)
        self.log_sigma = nn.Linear(self.encoder.size, latent)
        self.decoder = Decoder(shape, features, classes + latent, outputs)
        self.pixel = likelihood(pixel, shape, outputs, components)

    def infer(self, inputs: Tensor, noise: Tensor) -> tuple[Tensor, list[Layer]]:
        """Draw w and z of each image."""
        with torch.no_grad():
            logits = self.labeller.logits(inputs)[1]
        features, mu = self.encoder(inputs)
        origin = torch.zeros_like(mu[:1])
        label_noise, rest = self._parted(noise)
        layers = [
            self._labelled(logits, label_noise),
            Layer(
                Gaussian(mu, bounded(self.log_sigma(features))).over_draws(),
                Gaussian(origin, origin),
                rest,
            ),
        ]
        code = torch.cat([layer.q.at(layer.noise) for layer in layers], dim=3)
        return self.decoder(code.flatten(0, 2)), layers

    def generate(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode w drawn from the prior of the class, and z from N(0, I)."""
        label_noise, z = self._parted(noise)
        w = Gaussian.of(self.prior[labels]).at(label_noise)
        return self.decoder(torch.cat([w, z], dim=1))

    def code(self, layers: list[Layer]) -> Tensor:
        """Return the means of w and z, (N, K + Z)."""
        return torch.cat([layer.q.mu[0, :, 0] for layer in layers], dim=1)

    def class_evidence(self, images: Tensor) -> Tensor:
        """Return -KL(q(w|x) || p(w|y)) of each class, as the labeller learns it: (N, K)."""
        with precise(images):
            logits = self.labeller.noisy_logits(self.centred(self.quantise(images)))[1]
            divergence: Tensor = self._labelled(logits, self.noise[:1, None, None]).kl()
        return -divergence[0]

    def is_edge(self, name: str) -> bool:
        """Tell of the labeller's parameters what it says itself."""
        part, _, rest = name.partition(".")
        return self.labeller.is_edge(rest) if part == "labeller" else super().is_edge(name)

    def _labelled(self, logits: Tensor, noise: Tensor) -> Layer:
        q = Gaussian(self.scale * logits, bounded(self.log_sigma_w)[None])
        return Layer(q.over_draws(), Gaussian.of(self.prior), noise)

    def _parted(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return noise[..., : self.classes], noise[..., self.classes :]
