"""Convolutional variational autoencoder: a lower bound on log p(x) or log p(x|y) in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anomalyd.density.base import ImageShape
from anomalyd.density.encoder import Decoder, Encoder
from anomalyd.density.likelihoods import likelihood
from anomalyd.density.precision import precise
from anomalyd.density.variational import Gaussian, Layer, Variational, bounded

__all__ = ["VAE"]


class VAE(Variational):
    """log p(x|y) >= E_q[log p(x|z)] - KL(q(z|x) || p(z|y)), q diagonal Gaussian.

    A class is a prior p(z|y) = N(mu_y, diag sigma_y^2), learned; without classes it is N(0, I).
    The encoder q(z|x) and the decoder p(x|z) are the same for all classes, so the bounds of all
    K cost one pass of each.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2014);
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016);
        the prior of a class: Learning Structured Output Representation using Deep Conditional
        Generative Models (Sohn, Lee, Yan, 2015).

    Args:
        shape: the image shape, at least 4x4.
        classes: K for p(x|y), 0 for p(x).
        features: channels at half the resolution, doubled at a quarter.
        latent: dimensions Z of z.
        blocks: residual blocks of the encoder at either resolution.
        outputs: channels at full resolution, which the distribution of a pixel reads.
        pixel: the distribution of one pixel, a name in `likelihoods`.
        components: logistics in the mixture, where that is chosen.
        bound: `elbo` or `iwae`.
        samples: S, noise vectors in the bank.
    """

    prior: Tensor
    edges = ("prior", "pixel")

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
    ) -> None:
        super().__init__(shape, classes, (latent,), bound, samples)
        self.encoder = Encoder(shape, features, latent, blocks)
        self.log_sigma = nn.Linear(self.encoder.size, latent)
        self.decoder = Decoder(shape, features, latent, outputs)
        self.pixel = likelihood(pixel, shape, outputs, components)
        # Mean and log standard deviation of each class.
        prior = torch.zeros(max(1, classes), 2 * latent)
        if classes:
            self.prior = nn.Parameter(prior)
        else:
            self.register_buffer("prior", prior, persistent=False)

    def infer(self, inputs: Tensor, noise: Tensor) -> tuple[Tensor, list[Layer]]:
        """Draw z of each image."""
        q = self._code(inputs)
        context = self.decoder(q.at(noise).flatten(0, 2))
        return context, [Layer(q, Gaussian.of(self.prior), noise)]

    def class_evidence(self, images: Tensor) -> Tensor:
        """Return -KL(q(z|x) || p(z|y)) of each class, without decoding: (N, K)."""
        with precise(images):
            q = self._code(self.centred(self.quantise(images)))
            divergence: Tensor = Layer(q, Gaussian.of(self.prior), self.noise[:1, None, None]).kl()
        return -divergence[0]

    def _code(self, inputs: Tensor) -> Gaussian:
        """Return q(z|x), (1, N, 1, Z)."""
        features, mu = self.encoder(inputs)
        return Gaussian(mu, bounded(self.log_sigma(features))).over_draws()

    def generate(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode a z drawn from the prior, that of the class where there are any."""
        prior = self.prior if labels is None else self.prior[labels]
        return self.decoder(Gaussian.of(prior).at(noise))
