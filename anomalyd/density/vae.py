"""Convolutional variational autoencoder: a lower bound on log p(x) in one pass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import Density, ImageShape, Scores, largest_patch, total
from anomalyd.density.likelihoods import likelihood

__all__ = ["VAE"]


class Encoder(nn.Module):
    """Two stride-2 convolutions and a linear layer: (N, C, H, W) -> mu, log sigma, (N, Z) each."""

    def __init__(self, shape: ImageShape, features: int, latent: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(shape.channels, features, 3, padding=1),
                nn.Conv2d(features, 2 * features, 4, stride=2, padding=1),
                nn.Conv2d(2 * features, 4 * features, 4, stride=2, padding=1),
            ]
        )
        self.out = nn.Linear(4 * features * (shape.height // 4) * (shape.width // 4), 2 * latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = F.elu(conv(x))
        mu, log_sigma = self.out(x.flatten(1)).chunk(2, dim=1)
        # Bounded softly to (-6, 6): an unseen image must not overflow exp.
        return mu, 6 * torch.tanh(log_sigma / 6)


class Decoder(nn.Module):
    """A linear layer and two doublings: z (N, Z) -> features (N, F, H, W)."""

    def __init__(self, shape: ImageShape, features: int, latent: int) -> None:
        super().__init__()
        self.shape = shape
        # One more than a quarter where the side does not divide by four; the excess is cropped.
        self.low = (math.ceil(shape.height / 4), math.ceil(shape.width / 4))
        self.wide = 4 * features
        self.start = nn.Linear(latent, self.wide * self.low[0] * self.low[1])
        self.ups = nn.ModuleList(
            [
                nn.ConvTranspose2d(4 * features, 2 * features, 4, stride=2, padding=1),
                nn.ConvTranspose2d(2 * features, features, 4, stride=2, padding=1),
            ]
        )
        self.last = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.elu(self.start(z)).reshape(-1, self.wide, *self.low)
        for up in self.ups:
            x = F.elu(up(x))
        return self.last(x[:, :, : self.shape.height, : self.shape.width])


class VAE(Density):
    """log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || N(0, I)), q diagonal Gaussian.

    With `bound = "iwae"` and K samples, log p(x) >= log 1/K sum_k p(x, z_k) / q(z_k | x). The
    noise of a score is a fixed bank in the graph, so that one image always gets one score;
    training draws fresh noise. `nll_map` is -log p(x|z) by pixel; the KL term has no place in
    the image.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2014);
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016).

    Args:
        shape: the image shape, at least 4x4.
        features: channels at full resolution, doubled at each halving.
        latent: dimensions of z.
        pixel: `categorical` or `logistic-mixture`.
        components: logistics in the mixture.
        bound: `elbo` or `iwae`.
        samples: K, noise vectors in the bank.
    """

    noise: Tensor
    statistics = ("reconstruction", "kl", "mu_norm", "log_sigma_mean", "nll_patch")
    units = ("nats", "nats", "1", "1", "nats")

    def __init__(
        self,
        shape: ImageShape,
        *,
        features: int = 16,
        latent: int = 32,
        pixel: str = "logistic-mixture",
        components: int = 5,
        bound: str = "elbo",
        samples: int = 1,
    ) -> None:
        super().__init__(shape)
        if min(shape.height, shape.width) < 4:
            raise ValueError(f"a VAE needs at least 4x4 pixels, not {shape.height}x{shape.width}")
        if bound not in ("elbo", "iwae"):
            raise ValueError(f"bound is elbo or iwae, not {bound!r}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, not {samples}")
        self.bound = bound
        self.likelihood = f"iwae-{samples}" if bound == "iwae" else "elbo"
        self.encoder = Encoder(shape, features, latent)
        self.decoder = Decoder(shape, features, latent)
        self.pixel = likelihood(pixel, shape, features, components)
        bank = torch.randn(samples, latent, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", bank)

    def forward(self, images: Tensor) -> Scores:
        """Score `images`, uint8 (N, H, W, C), with the fixed bank."""
        values = self.quantise(images)
        inputs = self.centred(values)
        mu, log_sigma = self.encoder(inputs)
        maps, weights, kl = [], [], gaussian_kl(mu, log_sigma)
        for eps in self.noise:  # unrolled: K is a constant of the graph
            nll_map = -self.pixel(self.decoder(mu + log_sigma.exp() * eps), values, inputs)
            maps.append(nll_map)
            weights.append(self._log_weight(nll_map, mu, log_sigma, eps, kl))
        nll_map = torch.stack(maps).mean(dim=0)
        log_weights = torch.stack(weights)  # (K, N) float64
        if self.bound == "iwae":
            log_p = torch.logsumexp(log_weights, dim=0) - math.log(len(maps))
        else:
            log_p = log_weights.mean(dim=0)
        statistics = [
            total(nll_map),
            kl.float(),
            mu.square().sum(dim=1).sqrt(),
            log_sigma.mean(dim=1),
            largest_patch(nll_map),
        ]
        return Scores(
            log_likelihood=log_p.float().unsqueeze(1),
            statistics=torch.stack(statistics, dim=1),
            nll_map=nll_map,
        )

    def loss(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the negative bound under fresh noise, bits per dimension."""
        values = self.quantise(images)
        inputs = self.centred(values)
        mu, log_sigma = self.encoder(inputs)
        kl, weights = gaussian_kl(mu, log_sigma), []
        for _ in range(len(self.noise) if self.bound == "iwae" else 1):
            eps = torch.randn_like(mu)
            nll_map = -self.pixel(self.decoder(mu + log_sigma.exp() * eps), values, inputs)
            weights.append(self._log_weight(nll_map, mu, log_sigma, eps, kl))
        log_p = torch.logsumexp(torch.stack(weights), dim=0) - math.log(len(weights))
        return self.bits_per_dim(log_p).mean().float()

    def _log_weight(
        self, nll_map: Tensor, mu: Tensor, log_sigma: Tensor, eps: Tensor, kl: Tensor
    ) -> Tensor:
        """Return log p(x, z_k) / q(z_k | x), its Gaussian part integrated for the ELBO."""
        log_p_x = -nll_map.double().sum(dim=(1, 2))
        if self.bound == "elbo":
            return log_p_x - kl
        z = mu + log_sigma.exp() * eps
        ratio = (eps.square() - z.square()).double().sum(dim=1) / 2 + log_sigma.double().sum(dim=1)
        return log_p_x + ratio


def gaussian_kl(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Return KL(N(mu, sigma^2) || N(0, I)) in nats, (N,) float64."""
    terms = mu.square() + torch.exp(2 * log_sigma) - 1 - 2 * log_sigma
    return terms.double().sum(dim=1) / 2
