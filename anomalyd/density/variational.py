"""What densities with Gaussian latent variables share: the bound on log p(x), and its noise.

    ELBO      log p(x) >= E_q[log p(x|z)] - sum_l KL(q(z_l|x) || p(z_l))
    IWAE-S    log p(x) >= E log 1/S sum_s p(x, z_s) / q(z_s|x), tighter as S grows

The noise of a score is a fixed bank in the graph, so that one image always gets one score;
training draws fresh noise.

References:
    Auto-Encoding Variational Bayes (Kingma, Welling, 2014);
    Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anomalyd.density.base import Density, ImageShape, PixelLikelihood, Scores
from anomalyd.density.precision import precise
from anomalyd.density.summary import largest_patch, total

__all__ = ["Gaussian", "Layer", "Variational", "bounded"]


class Gaussian(NamedTuple):
    """N(mu, diag sigma^2) over the last dimension."""

    mu: Tensor
    log_sigma: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """Return mu + sigma * noise."""
        return self.mu + self.log_sigma.exp() * noise

    def over_draws(self) -> Gaussian:
        """Give (N, Z) the dimensions of draws and classes: (1, N, 1, Z)."""
        return Gaussian(self.mu[None, :, None], self.log_sigma[None, :, None])

    @classmethod
    def of(cls, parameters: Tensor) -> Gaussian:
        """Read mu and an unbounded log sigma side by side, (..., 2 Z)."""
        mu, log_sigma = parameters.chunk(2, dim=-1)
        return cls(mu, bounded(log_sigma))


class Layer(NamedTuple):
    """A stochastic layer of S draws for N images under M classes; each is 1 where all agree.

    Attributes:
        q: what the image says of z, (S, N, M, Z).
        p: what is known of z without the image, (S, N, M, Z).
        noise: by which z was drawn from q, (S, N, M, Z).
    """

    q: Gaussian
    p: Gaussian
    noise: Tensor

    def kl(self) -> Tensor:
        """Return KL(q || p) in nats: (S, N, M) float64."""
        apart = (self.q.mu - self.p.mu) * torch.exp(-self.p.log_sigma)
        log_ratio = self.q.log_sigma - self.p.log_sigma
        terms = apart.square() + torch.exp(2 * log_ratio) - 1 - 2 * log_ratio
        return terms.double().sum(dim=3) / 2

    def log_ratio(self) -> Tensor:
        """Return log p(z) / q(z) at the z drawn, in nats: (S, N, M) float64."""
        apart = (self.q.at(self.noise) - self.p.mu) * torch.exp(-self.p.log_sigma)
        terms = (self.noise.square() - apart.square()) / 2 + self.q.log_sigma - self.p.log_sigma
        return terms.double().sum(dim=3)


class Variational(Density):
    """A lower bound on log p(x), or on log p(x|y) for each class; `nll_map` is -log p(x|z).

    The divergence has no place in the image. Subclasses implement `infer` and `generate` and set
    `pixel`, a module of `likelihoods`.

    Args:
        shape: the image shape.
        classes: K for p(x|y), 0 for p(x).
        latents: dimensions of each stochastic layer, the one nearest the image first.
        bound: `elbo` or `iwae`.
        samples: S, noise vectors in the bank.
    """

    noise: Tensor
    pixel: PixelLikelihood

    def __init__(
        self, shape: ImageShape, classes: int, latents: tuple[int, ...], bound: str, samples: int
    ) -> None:
        super().__init__(shape, classes)
        if bound not in ("elbo", "iwae"):
            raise ValueError(f"bound is elbo or iwae, not {bound!r}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, not {samples}")
        self.bound = bound
        self.likelihood = f"iwae-{samples}" if bound == "iwae" else "elbo"
        self.latent = sum(latents)
        names = [f"kl_{number}" for number in range(1, len(latents) + 1)]
        if len(names) == 1:
            names = ["kl"]
        self.statistics = ("reconstruction", *names, "mu_norm", "log_sigma_mean", "nll_patch")
        self.units = ("nats", *["nats"] * len(names), "1", "1", "nats")
        bank = torch.randn(samples, self.latent, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", bank)

    def infer(self, inputs: Tensor, noise: Tensor) -> tuple[Tensor, list[Layer]]:
        """Draw the latent variables of each image.

        Args:
            inputs: (N, C, H, W) in [-1, 1].
            noise: (S, N or 1, 1, `self.latent`) standard normal.

        Returns:
            what the pixels' distribution depends on, (S * N, F, H, W), and the layers, the one
            nearest the image first.
        """
        raise NotImplementedError

    def generate(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what the pixels of a sample depend on, (N, F, H, W), from noise (N, latent)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Scores:
        """Score `images`, uint8 (N, H, W, C), with the fixed bank, under every class."""
        nll_maps, layers = self._drawn(images, self.noise[:, None, None])
        nll_map = nll_maps.mean(dim=0)
        log_p = self._bound(nll_maps, layers)
        kls = torch.broadcast_tensors(*(layer.kl().mean(dim=0).float() for layer in layers))
        divergences = torch.stack(kls, dim=2)
        best = log_p.argmax(dim=1).reshape(-1, 1, 1).expand(-1, 1, len(layers))
        top = layers[-1].q
        mu, log_sigma = top.mu[0, :, 0], top.log_sigma[0, :, 0]
        statistics = [
            total(nll_map).unsqueeze(1),
            divergences.gather(1, best)[:, 0],
            mu.square().sum(dim=1, keepdim=True).sqrt(),
            log_sigma.mean(dim=1, keepdim=True),
            largest_patch(nll_map).unsqueeze(1),
        ]
        return Scores(
            log_likelihood=log_p.float(),
            statistics=torch.cat(statistics, dim=1),
            nll_map=nll_map,
            embedding=self.code(layers),
        )

    def code(self, layers: list[Layer]) -> Tensor:
        """Return what the image is known by among codes, (N, E): the mean of the top layer."""
        return layers[-1].q.mu[0, :, 0]

    def losses(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the negative bound of each image under the fixed bank, in bits/dim: (N,)."""
        return self._losses(images, labels, self.noise[:, None, None])

    def noisy_losses(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the same under fresh noise: (N,)."""
        samples = len(self.noise) if self.bound == "iwae" else 1
        noise = torch.randn(samples, len(images), 1, self.latent, device=images.device)
        return self._losses(images, labels, noise)

    def _losses(self, images: Tensor, labels: Tensor | None, noise: Tensor) -> Tensor:
        self.check_labels(labels)
        log_p = self.bounds(images, noise)
        if self.classes and labels is not None:
            log_p = log_p.gather(1, labels.unsqueeze(1))
        return self.bits_per_dim(log_p)[:, 0].float()

    def bounds(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the bound under the given noise, (S, N or 1, 1, latent): (N, K or 1) float64."""
        with precise(images):
            return self._bound(*self._drawn(images, noise))

    def log_probs(
        self, images: Tensor, labels: Tensor | None = None, latent: Tensor | None = None
    ) -> Tensor:
        """Return log p of every level of every value given z, and in its pixel those before it.

        Raises:
            ValueError: no noise to draw z by, or no labels where there are classes.
        """
        if latent is None:
            raise ValueError(f"drawing z needs `latent`, noise of (N, {self.latent})")
        self.check_labels(labels)
        context = self.generate(latent, labels)
        return self.pixel.log_probs(context, self.centred(self.quantise(images)))

    @property
    def order(self) -> Tensor:
        """All pixels at once, in a pixel red, green, blue: int64 (H, W, C)."""
        return torch.arange(self.shape.channels).expand(self.shape[:3])

    def _drawn(self, images: Tensor, noise: Tensor) -> tuple[Tensor, list[Layer]]:
        """Return -log p(x|z) by pixel, (S, N, H, W), and the layers that z came from."""
        values = self.quantise(images)
        inputs = self.centred(values)
        context, layers = self.infer(inputs, noise)
        samples = len(noise)
        if samples > 1:
            values = values.repeat(samples, 1, 1, 1)
            inputs = inputs.repeat(samples, 1, 1, 1)
        return -self.pixel(context, values, inputs).unflatten(0, (samples, -1)), layers

    def _bound(self, nll_maps: Tensor, layers: list[Layer]) -> Tensor:
        """Return the bound on log p(x|y) in nats: (N, M) float64."""
        log_p_x = -nll_maps.double().sum(dim=(2, 3)).unsqueeze(2)
        if self.bound == "elbo":
            # The Gaussian part is integrated, so it adds no noise.
            return (log_p_x - sum(layer.kl() for layer in layers)).mean(dim=0)
        log_weights = log_p_x + sum(layer.log_ratio() for layer in layers)
        return torch.logsumexp(log_weights, dim=0) - math.log(len(nll_maps))


def bounded(log_sigma: Tensor) -> Tensor:
    """Confine log sigma softly to (-6, 6): an unseen image must not overflow exp."""
    return 6 * torch.tanh(log_sigma / 6)
