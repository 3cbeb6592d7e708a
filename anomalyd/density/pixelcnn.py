"""PixelCNN: masked convolutions that see the pixels above, and to the left in this row.

      o o o o o o o        the first layer, mask A, 7x7: the present pixel x is left out
      o o o o o o o
      o o o o o o o        o o o
      o o o x . . .        o x .     the others, mask B, 3x3: x is part of it, for features at x
      . . . . . . .        . . .     know nothing of the pixel at x
      . . . . . . .
      . . . . . . .

The blind spot: a layer of mask B looks one column to the right for each row that it looks up, so
that in the row r above, what lies more than r + 2 columns to the right is seen by no stack of
layers, however deep. Two stacks (`gated_pixelcnn`) do away with it.

Features are of pixels, not of channels: green follows red, and blue both, in the likelihood of
the pixel, and not through masks that split the features into three.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import Autoregressive, ImageShape, Step
from anomalyd.density.layers import position
from anomalyd.density.likelihoods import likelihood
from anomalyd.density.stepwise_stack import PixelStep, RowStep

__all__ = ["MaskedConv", "PixelCNN"]


class MaskedConv(nn.Module):
    """A k x k convolution masked to the pixels before the present one, and to it in mask B.

    The masked half is not multiplied by zero but left away: what remains are the rows above,
    k//2 x k, and the left part of the row, 1 x k//2, one longer in mask B.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: odd side k, at least 3.
        mask: `A`, or `B`, which includes the present pixel.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, mask: str) -> None:
        super().__init__()
        half, present = kernel // 2, int(mask == "B")
        self.above = nn.Conv2d(inputs, outputs, (half, kernel))
        self.left = nn.Conv2d(inputs, outputs, (1, half + present), bias=False)
        # Padding by -1 drops the present row, or column: the shift of what is seen.
        self.rows = (half, half, half, -1)
        self.columns = (half, present - 1, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H, W)."""
        return self.above(F.pad(x, self.rows)) + self.left(F.pad(x, self.columns))


class ResidualBlock(nn.Module):
    """h + 1x1, 3x3 of mask B at half the width, 1x1: an ELU before each.

    Attributes:
        above: channels that it reads of the row above a pixel.
        left: channels that it reads of the pixel to the left.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.above = self.left = features // 2
        self.layers = nn.Sequential(
            nn.ELU(),
            nn.Conv2d(features, features // 2, 1),
            nn.ELU(),
            MaskedConv(features // 2, features // 2, 3, "B"),
            nn.ELU(),
            nn.Conv2d(features // 2, features, 1),
        )

    def forward(self, h: Tensor) -> Tensor:
        """Map (N, features, H, W) likewise."""
        return h + self.layers(h)

    def row(self, h: Tensor, above: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map a row given `above`; return also what the row below sees: see `stepwise_stack`."""
        seen = self.layers[:3](h)
        mixed = above + self._masked.left(F.pad(seen, self._masked.columns))
        return h + self.layers[4:](mixed), seen

    def below(self, seen: Tensor) -> Tensor:
        """Return what a row reads of the row above."""
        return self._masked.above(F.pad(seen, (1, 1)))

    def pixel(self, h: Tensor, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Map a pixel; return also what the next one reads of it."""
        seen = self.layers[:3](h)
        mixed = above + self._masked.left(torch.cat([left, seen], dim=3))
        return h + self.layers[4:](mixed), seen

    @property
    def _masked(self) -> MaskedConv:
        return cast("MaskedConv", self.layers[3])


class PixelCNN(Autoregressive):
    """log p(x) = sum_t log p(x_t | x_<t), exact, over pixels in raster order.

    References:
        Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016).

    Args:
        shape: the image shape.
        features: channels between the blocks, 2h in the paper; even.
        blocks: residual blocks; each sees one row and one column more.
        kernel: odd side of the first layer's kernel.
        pixel: the distribution of one pixel, a name in `likelihoods`.
        components: logistics in the mixture, where that is chosen.
    """

    position: Tensor
    edges = ("first", "pixel")

    def __init__(
        self,
        shape: ImageShape,
        *,
        features: int = 44,
        blocks: int = 11,
        kernel: int = 7,
        pixel: str = "hierarchical",
        components: int = 10,
    ) -> None:
        super().__init__(shape)
        if kernel % 2 == 0 or kernel < 3:
            raise ValueError(f"the kernel side must be odd and at least 3, not {kernel}")
        if features % 2 or features < 2:
            raise ValueError(f"features must be even, for blocks of half of them, not {features}")
        self.register_buffer("position", position(shape), persistent=False)
        self.first = MaskedConv(shape.channels + 2, features, kernel, "A")
        self.blocks = nn.Sequential(*(ResidualBlock(features) for _ in range(blocks)))
        self.last = nn.Sequential(nn.ELU(), nn.Conv2d(features, features, 1))
        self.pixel = likelihood(pixel, shape, features, components)

    def context(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what each pixel's distribution is conditioned on, (N, 1, F, H, W)."""
        x = torch.cat([inputs, self.position.expand(inputs.shape[0], -1, -1, -1)], dim=1)
        return self.last(self.blocks(self.first(x))).unsqueeze(1)

    def one_by_one(self) -> tuple[Step, Step]:
        """Return the row's and the pixel's module of the cached sampler."""
        row = RowStep(self, self.blocks)
        return row, PixelStep(row)
