"""The contract that every density keeps: an exact log-likelihood, or a bound that says so."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Density", "ImageShape", "Scores", "largest_patch", "total"]


class ImageShape(NamedTuple):
    """Height, width and channels of an image, and the number of levels a value is quantised to."""

    height: int
    width: int
    channels: int = 1
    levels: int = 256

    @property
    def dims(self) -> int:
        """Dimensions H * W * C, by which bits per dimension divide."""
        return self.height * self.width * self.channels


class Scores(NamedTuple):
    """What one forward pass says of N images.

    Attributes:
        log_likelihood: (N, K) float32, nats; K classes, or 1.
        statistics: (N, S) float32, in the order of `Density.statistics`.
        nll_map: (N, H, W) float32, nats: minus the log-likelihood, pixel by pixel.
    """

    log_likelihood: Tensor
    statistics: Tensor
    nll_map: Tensor


class Density(nn.Module):
    """A density over images of one shape; subclasses implement `forward`.

    It does not decode, resize or normalise images: those are uint8 (N, H, W, C) as decoded.

    Attributes:
        shape: the image shape.
        likelihood: `exact`, `elbo` or `iwae-K`: what the log-likelihood is.
        statistics: the names of the columns of `Scores.statistics`.
        units: the unit of each statistic.
        edges: the submodules that embed the input or read out the distribution; optimisers that
            treat hidden kernels differently leave these alone.
    """

    likelihood: str = "exact"
    statistics: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    edges: tuple[str, ...] = ("pixel",)

    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        if shape.height < 1 or shape.width < 1 or shape.channels not in (1, 3):
            raise ValueError(f"an image is at least 1x1 with 1 or 3 channels, not {shape}")
        if not 2 <= shape.levels <= 256:
            raise ValueError(f"levels must lie in 2..256, not {shape.levels}")
        self.shape = shape

    def forward(self, images: Tensor) -> Scores:
        """Score `images`, uint8 (N, H, W, C), in one pass."""
        raise NotImplementedError

    def log_prob(self, images: Tensor) -> Tensor:
        """Return log p(x), or its lower bound, in nats: (N,) float32."""
        return self(images).log_likelihood[:, 0]

    def loss(self, images: Tensor) -> Tensor:
        """Return what training minimises: the mean of -log p(x), in bits per dimension."""
        return -self.log_prob(images).mean() / (self.shape.dims * math.log(2))

    def is_edge(self, name: str) -> bool:
        """Tell whether the parameter `name` embeds the input or reads out the distribution."""
        return name.split(".")[0] in self.edges

    def quantise(self, images: Tensor) -> Tensor:
        """Map bytes to levels, floor(x * levels / 256): int64 in [0, levels)."""
        if self.shape.levels == 256:
            return images.long()
        return torch.div(images.long() * self.shape.levels, 256, rounding_mode="floor")

    def centred(self, values: Tensor) -> Tensor:
        """Map levels to float32 in [-1, 1], channels first: (N, C, H, W)."""
        scaled = values.float() * (2 / (self.shape.levels - 1)) - 1
        return scaled.permute(0, 3, 1, 2)


def total(nll_map: Tensor) -> Tensor:
    """Sum a map over its pixels in float64, which float32 would round at 1e-4 nats: (N,)."""
    return nll_map.double().sum(dim=(1, 2)).float()


def largest_patch(nll_map: Tensor, side: int = 4) -> Tensor:
    """Return the largest mean of `nll_map` over a side x side window, (N,) nats a pixel."""
    side = min(side, nll_map.shape[1], nll_map.shape[2])
    return F.avg_pool2d(nll_map.unsqueeze(1), side, stride=1).amax(dim=(1, 2, 3))
