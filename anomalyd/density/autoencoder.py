"""The deterministic autoencoder: a code of few numbers, an image back from it, and no density."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from anomalyd.density.base import ImageShape, Model
from anomalyd.density.encoder import Decoder, Encoder
from anomalyd.density.summary import largest_patch

__all__ = ["Autoencoder", "Encoded"]


class Encoded(NamedTuple):
    """What an autoencoder says of N images.

    Attributes:
        statistics: (N, S) float32, in the order of `Autoencoder.statistics`.
        embedding: (N, Z) float32, the code.
    """

    statistics: Tensor
    embedding: Tensor


class Autoencoder(Model):
    """The mean of (x - d(e(x)))^2 over pixels and channels, x in [-1, 1]; e a code of Z numbers.

    References:
        Reducing the Dimensionality of Data with Neural Networks (Hinton, Salakhutdinov, 2006).

    Args:
        shape: the image shape, at least 4x4.
        features: channels at half the resolution, doubled at a quarter.
        latent: dimensions Z of the code.
        outputs: channels at full resolution.
    """

    kind = "autoencoder"
    unit = "mse"
    statistics = ("reconstruction_mse", "mse_patch")
    units = ("1", "1")
    edges = ("last",)

    def __init__(
        self, shape: ImageShape, *, features: int = 16, latent: int = 32, outputs: int = 8
    ) -> None:
        super().__init__(shape)
        self.encoder = Encoder(shape, features, latent)
        self.decoder = Decoder(shape, features, latent, outputs)
        self.last = nn.Conv2d(outputs, shape.channels, 1)

    def forward(self, images: Tensor) -> Encoded:
        """Encode and decode `images`, uint8 (N, H, W, C)."""
        error, code = self._error(images)
        statistics = [error.mean(dim=(1, 2)), largest_patch(error)]
        return Encoded(statistics=torch.stack(statistics, dim=1), embedding=code)

    def loss(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean squared error; labels are not read."""
        return self.losses(images).mean()

    def losses(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean squared error of each image: (N,)."""
        return self._error(images)[0].mean(dim=(1, 2))

    def log_prob(self, images: Tensor, *given: Tensor | None) -> NoReturn:
        """Refuse; `log_probs` likewise.

        Raises:
            TypeError: always.
        """
        raise TypeError("an autoencoder has no density, so no log p(x) and no samples: use a vae")

    log_probs = log_prob

    def _error(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squared error of each pixel, (N, H, W), and the codes (N, Z)."""
        inputs = self.centred(self.quantise(images))
        _, code = self.encoder(inputs)
        image = self.last(torch.relu(self.decoder(code)))
        return (image - inputs).square().mean(dim=1), code
