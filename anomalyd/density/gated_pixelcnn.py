"""Gated PixelCNN: two convolutional stacks that together see every pixel before the present one.

The vertical stack sees all rows above, the horizontal one the pixels to the left in this row and,
through a 1x1 link, the vertical stack; so nothing is missed (no blind spot) and nothing is leaked.

      v v v v v        A masked kernel would multiply the lower half by zero. Here the kernel is
      v v v v v        cropped to the half that counts, and the input is padded (shifted) instead:
      h h x . .        vertical  k//2+1 rows x k columns, horizontal  1 row x k//2+1 columns.
      . . . . .
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import Density, ImageShape, Scores, largest_patch, total
from anomalyd.density.likelihoods import likelihood

__all__ = ["GatedPixelCNN"]


class CroppedConv(nn.Module):
    """A convolution over pixels above, or to the left, whose kernel holds no zeros.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: (rows, columns) of the cropped kernel.
        left: columns of padding on the left, in units of the dilation.
        right: columns of padding on the right, likewise.
        dilation: distance between kernel taps.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        left: int,
        right: int,
        *,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, dilation=dilation)
        self.padding = (left * dilation, right * dilation, (kernel[0] - 1) * dilation, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H, W)."""
        return self.conv(F.pad(x, self.padding))


def gate(x: Tensor) -> Tensor:
    """Return tanh(a) * sigmoid(b) for the two halves a, b of the channels."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    """One layer of both stacks; the horizontal one is residual.

    Args:
        features: channels of each stack.
        kernel: odd width k of the receptive field, in taps.
        dilation: distance between taps.
    """

    def __init__(self, features: int, kernel: int, dilation: int) -> None:
        super().__init__()
        half = kernel // 2
        self.vertical = CroppedConv(
            features, 2 * features, (half + 1, kernel), half, half, dilation=dilation
        )
        self.horizontal = CroppedConv(
            features, 2 * features, (1, half + 1), half, 0, dilation=dilation
        )
        self.down = nn.Conv2d(2 * features, 2 * features, 1)
        self.out = nn.Conv2d(features, features, 1)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Map both stacks, (N, features, H, W) each."""
        above = self.vertical(v)
        return gate(above), h + self.out(gate(self.horizontal(h) + self.down(above)))


class GatedPixelCNN(Density):
    """log p(x) = sum_t log p(x_t | x_<t), exact, over pixels in raster order.

    References:
        Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016).

    Args:
        shape: the image shape.
        features: channels of each stack.
        dilations: one gated layer for each, in order.
        kernel: odd width of each layer's receptive field, in taps.
        pixel: `categorical` or `logistic-mixture`.
        components: logistics in the mixture, where that is chosen.
    """

    position: Tensor
    statistics = ("nll_patch",)
    units = ("nats",)
    edges = ("first_vertical", "first_horizontal", "pixel")

    def __init__(
        self,
        shape: ImageShape,
        *,
        features: int = 32,
        dilations: tuple[int, ...] = (1, 2, 1, 4, 1, 2, 1),
        kernel: int = 3,
        pixel: str = "categorical",
        components: int = 10,
    ) -> None:
        super().__init__(shape)
        if kernel % 2 == 0 or kernel < 3:
            raise ValueError(f"the kernel width must be odd and at least 3, not {kernel}")
        half = kernel // 2
        rows = torch.linspace(0.5, 1.5, shape.height).reshape(1, 1, -1, 1).expand(1, 1, *shape[:2])
        columns = (
            torch.linspace(0.5, 1.5, shape.width).reshape(1, 1, 1, -1).expand(1, 1, *shape[:2])
        )
        self.register_buffer("position", torch.cat([rows, columns], dim=1), persistent=False)
        inputs = shape.channels + 2
        self.first_vertical = CroppedConv(inputs, features, (half + 1, kernel), half, half)
        self.first_horizontal = CroppedConv(inputs, features, (1, half + 1), half, 0)
        self.layers = nn.ModuleList(GatedLayer(features, kernel, d) for d in dilations)
        self.pixel = likelihood(pixel, shape, features, components)

    def forward(self, images: Tensor) -> Scores:
        """Score `images`, uint8 (N, H, W, C)."""
        values = self.quantise(images)
        inputs = self.centred(values)
        nll_map = -self.pixel(self.context(inputs), values, inputs)
        return Scores(
            log_likelihood=-total(nll_map).unsqueeze(1),
            statistics=largest_patch(nll_map).unsqueeze(1),
            nll_map=nll_map,
        )

    def context(self, inputs: Tensor) -> Tensor:
        """Return what each pixel's distribution is conditioned on, (N, features, H, W).

        Args:
            inputs: (N, C, H, W) in [-1, 1].
        """
        # Row and column, never zero, so that they also tell padding from a mid-grey pixel.
        position = self.position.expand(inputs.shape[0], -1, -1, -1)
        x = torch.cat([inputs, position], dim=1)
        # The first layer must not see the present pixel: both stacks start shifted by one.
        v = self.first_vertical(F.pad(x, (0, 0, 1, -1)))
        h = self.first_horizontal(F.pad(x, (1, -1, 0, 0)))
        for layer in self.layers:
            v, h = layer(v, h)
        return h
