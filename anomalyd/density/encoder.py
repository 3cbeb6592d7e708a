"""The encoder and the decoder that the models with a code z share, so that weights can move.

A classifier, a VAE and an autoencoder of the same `features` have the same parameters under
`encoder.`: one can start from another.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import ImageShape

__all__ = ["Decoder", "Encoder"]


class Block(nn.Module):
    """x + W_2 relu(W_1 relu(x)), 3x3 convolutions that keep the size.

    References:
        Identity Mappings in Deep Residual Networks (He, Zhang, Ren, Sun, 2016).

    Args:
        features: channels.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(features, features, 3, padding=1)
        self.second = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, F, H, W) likewise."""
        return x + self.second(F.relu(self.first(F.relu(x))))


class Encoder(nn.Module):
    """Three convolutions, two of which halve the image, and a linear layer.

    Args:
        shape: the image shape, at least 4x4.
        features: channels at half the resolution, doubled at a quarter.
        latent: dimensions Z of the code.
        blocks: residual blocks at either resolution.

    Raises:
        ValueError: a smaller image.
    """

    def __init__(self, shape: ImageShape, features: int, latent: int, blocks: int = 0) -> None:
        super().__init__()
        if min(shape.height, shape.width) < 4:
            raise ValueError(
                f"an encoder needs at least 4x4 pixels, not {shape.height}x{shape.width}"
            )
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(shape.channels, features, 4, stride=2, padding=1),
                nn.Conv2d(features, 2 * features, 4, stride=2, padding=1),
                nn.Conv2d(2 * features, 2 * features, 3, padding=1),
            ]
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(size) for _ in range(blocks)))
            for size in (features, 2 * features)
        )
        self.size = 2 * features * (shape.height // 4) * (shape.width // 4)
        self.code = nn.Linear(self.size, latent)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, C, H, W) in [-1, 1] to features (N, D) and the code (N, Z)."""
        half, quarter, last = self.convs
        x = self.blocks[0](F.relu(half(inputs)))
        x = self.blocks[1](F.relu(quarter(F.relu(x))))
        x = F.relu(last(F.relu(x)))
        features = x.flatten(1)
        return features, self.code(features)


class Decoder(nn.Module):
    """A linear layer and two doublings by nearest neighbour, each smoothed by a convolution.

    Args:
        shape: the image shape.
        features: channels at half the resolution, doubled at a quarter.
        latent: dimensions Z of the code.
        outputs: channels at full resolution.
    """

    def __init__(self, shape: ImageShape, features: int, latent: int, outputs: int) -> None:
        super().__init__()
        self.shape = shape
        # One more than a quarter where the side does not divide by four; the excess is cropped.
        self.low = (2 * features, math.ceil(shape.height / 4), math.ceil(shape.width / 4))
        self.start = nn.Linear(latent, math.prod(self.low))
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(2 * features, features, 3, padding=1),
                nn.Conv2d(features, outputs, 3, padding=1),
            ]
        )

    def forward(self, z: Tensor) -> Tensor:
        """Map z (N, Z) to (N, outputs, H, W)."""
        x = self.start(z).unflatten(1, self.low)
        for conv in self.convs:
            # A transposed convolution would do the same at twice the price in onnxruntime.
            x = conv(F.interpolate(F.relu(x), scale_factor=2.0, mode="nearest"))
        return x[:, :, : self.shape.height, : self.shape.width]
