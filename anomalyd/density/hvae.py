"""Hierarchical variational autoencoder: stochastic layers over one another, a ladder down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import ImageShape
from anomalyd.density.encoder import Decoder, Encoder
from anomalyd.density.likelihoods import likelihood
from anomalyd.density.variational import Gaussian, Layer, Variational, bounded

__all__ = ["HVAE"]


class HVAE(Variational):
    """log p(x) >= E_q[log p(x|z_1)] - sum_l KL(q(z_l|z_l+1, x) || p(z_l|z_l+1)), p(z_L) = N(0, I).

    What the image says of a layer and what the layer above says of it are two Gaussians; q is
    their product, so that their precisions add up.

    References:
        Ladder Variational Autoencoders (Sønderby, Raiko, Maaløe, Sønderby, Winther, 2016).

    Args:
        shape: the image shape, at least 4x4.
        features: channels at half the resolution, doubled at a quarter.
        latents: dimensions of z_1, nearest the image, to z_L; two or more.
        hidden: units of each layer between two z.
        outputs: channels at full resolution, which the distribution of a pixel reads.
        pixel: the distribution of one pixel, a name in `likelihoods`.
        components: logistics in the mixture, where that is chosen.
        bound: `elbo` or `iwae`.
        samples: S, noise vectors in the bank.
    """

    def __init__(
        self,
        shape: ImageShape,
        *,
        features: int = 16,
        latents: tuple[int, ...] = (32, 16),
        hidden: int = 128,
        outputs: int = 8,
        pixel: str = "logistic-mixture",
        components: int = 3,
        bound: str = "elbo",
        samples: int = 1,
    ) -> None:
        super().__init__(shape, 0, tuple(latents), bound, samples)
        if len(latents) < 2:
            raise ValueError(f"latents are two sizes or more, not {list(latents)}; or use a vae")
        self.latents = tuple(latents)
        first, *above = self.latents
        self.encoder = Encoder(shape, features, first)
        self.log_sigma = nn.Linear(self.encoder.size, first)
        sizes = [self.encoder.size] + [hidden] * len(above)
        self.up = nn.ModuleList(nn.Linear(size, hidden) for size in sizes[:-1])
        self.read = nn.ModuleList(nn.Linear(hidden, 2 * latent) for latent in above)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Linear(upper, hidden), nn.ReLU(), nn.Linear(hidden, 2 * lower))
            for lower, upper in zip(self.latents, above, strict=False)
        )
        self.decoder = Decoder(shape, features, first, outputs)
        self.pixel = likelihood(pixel, shape, outputs, components)

    def infer(self, inputs: Tensor, noise: Tensor) -> tuple[Tensor, list[Layer]]:
        """Draw z_L to z_1 of each image, from the top down."""
        h, mu = self.encoder(inputs)
        seen = [Gaussian(mu, bounded(self.log_sigma(h)))]
        for up, read in zip(self.up, self.read, strict=True):
            h = F.relu(up(h))
            seen.append(Gaussian.of(read(h)))
        q = seen[-1].over_draws()
        parts = noise.split(self.latents, dim=3)
        origin = torch.zeros_like(q.mu)
        layers = [Layer(q, Gaussian(origin, origin), parts[-1])]
        for place in reversed(range(len(self.down))):
            p = Gaussian.of(self.down[place](q.at(layers[0].noise)))
            q = _product(seen[place].over_draws(), p)
            layers.insert(0, Layer(q, p, parts[place]))
        return self.decoder(q.at(parts[0]).flatten(0, 2)), layers

    def generate(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode a z_1 drawn ancestrally: z_L from N(0, I), each z_l given the one above."""
        *parts, z = noise.split(self.latents, dim=1)
        for down, part in zip(reversed(self.down), reversed(parts), strict=True):
            z = Gaussian.of(down(z)).at(part)
        return self.decoder(z)


def _product(a: Gaussian, b: Gaussian) -> Gaussian:
    """Return the normalised product of two Gaussian densities."""
    weight_a, weight_b = torch.exp(-2 * a.log_sigma), torch.exp(-2 * b.log_sigma)
    both = weight_a + weight_b
    return Gaussian((a.mu * weight_a + b.mu * weight_b) / both, -torch.log(both) / 2)
