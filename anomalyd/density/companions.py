"""A density and its companions: small ones beside it that see what it overlooks.

    local    a PixelCNN that sees two pixels far: what an image costs by texture alone. What the
             main density saves on that is what it knows of the whole image.
    vae      a code of few numbers: whether there is a familiar object, and where not.

The likelihood, the samples and the map are the main density's alone; companions add statistics,
which the score weighs. All are trained side by side, each by its own likelihood.

References:
    the two code lengths: Likelihood Ratios for Out-of-Distribution Detection (Ren et al., 2019)
    and On the Out-of-distribution Generalization of Probabilistic Image Modelling (Zhang, Zhang,
    McDonagh, 2021);
    many statistics of one image: Density of States Estimation for Out-of-Distribution Detection
    (Morningstar et al., 2021).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from anomalyd.density.base import Autoregressive, Density, Scores, Step
from anomalyd.density.vae import VAE

__all__ = ["Companions"]

VAE_STATISTICS = ("kl", "mu_norm", "log_sigma_mean", "nll_patch")


class Companions(Density):
    """log p(x), or log p(x|y), of `main`, with statistics of others beside it.

    Of a companion only what the others do not say is kept: its code length, the local density's
    excess, the code and the largest patch of the VAE, and how many nats each is better or worse
    than the local density.

    Args:
        main: the density whose likelihood counts.
        local: a PixelCNN with a small window.
        vae: a variational autoencoder; None without.
    """

    def __init__(self, main: Density, local: Autoregressive, vae: VAE | None = None) -> None:
        super().__init__(main.shape, main.classes)
        self.main, self.local, self.vae = main, local, vae
        self.likelihood, self.latent = main.likelihood, main.latent
        self.statistics = (*main.statistics, "local_nll", "local_excess", "nll_over_local")
        self.units = (*main.units, "nats", "1", "nats")
        if vae is not None:
            self.statistics += tuple(f"vae_{name}" for name in VAE_STATISTICS)
            self.statistics += ("vae_over_local",)
            self.units += tuple(vae.units[vae.statistics.index(name)] for name in VAE_STATISTICS)
            self.units += ("nats",)

    def forward(self, images: Tensor) -> Scores:
        """Score `images`, uint8 (N, H, W, C), in one pass of each density."""
        scores = self.main(images)
        local = self.local(images)
        local_nll = -local.log_likelihood[:, 0]
        statistics = [
            local_nll,
            _column(self.local, local, "excess"),
            -scores.log_likelihood.amax(dim=1) - local_nll,
        ]
        embedding = scores.embedding
        if self.vae is not None:
            vae = self.vae(images)
            embedding = vae.embedding
            statistics += [_column(self.vae, vae, name) for name in VAE_STATISTICS]
            statistics.append(_column(self.vae, vae, "reconstruction") - local_nll)
        columns = torch.cat([scores.statistics, torch.stack(statistics, dim=1)], dim=1)
        return scores._replace(statistics=columns, embedding=embedding)

    def loss(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the sum of the losses of those that are not frozen, in bits per dimension."""
        losses = []
        if not _frozen(self.main):
            losses.append(self.main.loss(images, labels))
        losses += [part.loss(images) for part in self._beside() if not _frozen(part)]
        return torch.stack(losses).sum()

    @property
    def loss_name(self) -> str:
        """That of what is trained, and of how many densities it is the sum."""
        trained = [part for part in (self.main, *self._beside()) if not _frozen(part)]
        name = " and ".join(dict.fromkeys(part.loss_name for part in trained))
        return name if len(trained) == 1 else f"{name} of {len(trained)} densities together"

    def losses(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the main density's loss of each image; the companions' where it is frozen."""
        if not _frozen(self.main):
            return self.main.losses(images, labels)
        return torch.stack([part.losses(images) for part in self._beside()]).sum(dim=0)

    def log_probs(
        self, images: Tensor, labels: Tensor | None = None, latent: Tensor | None = None
    ) -> Tensor:
        """Return log p of every level of every value, by the main density."""
        return self.main.log_probs(images, labels, latent)

    def one_by_one(self) -> tuple[Step, Step] | None:
        """Return the main density's cached sampler."""
        return self.main.one_by_one()

    @property
    def order(self) -> Tensor:
        """The main density's order."""
        return self.main.order

    def is_edge(self, name: str) -> bool:
        """Tell of a parameter what the density that it belongs to says."""
        part, _, rest = name.partition(".")
        return cast("Density", getattr(self, part)).is_edge(rest)

    def _beside(self) -> list[Density]:
        return [self.local] if self.vae is None else [self.local, self.vae]


def _column(density: Density, scores: Scores, name: str) -> Tensor:
    return scores.statistics[:, density.statistics.index(name)]


def _frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())
