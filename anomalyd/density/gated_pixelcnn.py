"""Gated PixelCNN: two convolutional stacks that together see every pixel before the present one.

The vertical stack sees all rows above, the horizontal one the pixels to the left in this row and,
through a 1x1 link, the vertical stack; so nothing is missed (no blind spot) and nothing is leaked.

      v v v v v        kernels of the vertical stack: k//2+1 rows x k columns
      v v v v v
      h h x . .        of the horizontal stack: 1 row x k//2+1 columns
      . . . . .

A class enters every layer of the horizontal stack, as a bias before the gate. The vertical stack,
more than half of the work, is the same for all classes and is computed once for all of them.

Not in the paper: `readout` and `nearby`. The kernels read a level as one number, which tells 252
from 253 by a 255th of its range; hidden units before the softmaxes can be told the levels of the
four nearest pixels by name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import Autoregressive, ImageShape, Step
from anomalyd.density.layers import ClassBias, CroppedConv, Nearby, gate, halves, position
from anomalyd.density.likelihoods import likelihood
from anomalyd.density.stepwise import PixelStep, RowStep

__all__ = ["GatedPixelCNN"]


class GatedLayer(nn.Module):
    """One layer of both stacks; the horizontal one is residual.

    Args:
        features: channels of each stack.
        kernel: odd width k of the receptive field, in taps.
        dilation: distance between taps.
        classes: K, or 0.
    """

    def __init__(self, features: int, kernel: int, dilation: int, classes: int) -> None:
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
        self.condition = ClassBias(classes, 2 * features) if classes else None

    def forward(self, v: Tensor, h: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map v (N, F, H, W) and h (N * M, F, H, W) likewise, h for each of the M classes."""
        above = halves(self.vertical.conv, self.vertical.padded(v))
        seen = halves(self.down, *above)
        if self.condition is not None and labels is not None:
            terms = self.condition(labels).chunk(2, dim=2)
            seen = [(a.unsqueeze(1) + b).flatten(0, 1) for a, b in zip(seen, terms, strict=True)]
        left = halves(self.horizontal.conv, self.horizontal.padded(h))
        mixed = (a + b for a, b in zip(left, seen, strict=True))
        return gate(*above), h + self.out(gate(*mixed))


class GatedPixelCNN(Autoregressive):
    """log p(x) or log p(x|y) = sum_t log p(x_t | x_<t, y), exact, over pixels in raster order.

    References:
        Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016).

    Args:
        shape: the image shape.
        classes: K for p(x|y), 0 for p(x).
        features: channels of each stack.
        dilations: one gated layer for each, in order.
        kernel: odd width of each layer's receptive field, in taps.
        pixel: the distribution of one pixel, a name in `likelihoods`.
        components: logistics in the mixture, where that is chosen.
        readout: hidden units from which a hierarchical pixel is read, too, or 0.
        nearby: numbers by which they read the level of each of the four nearest pixels, or 0.
    """

    position: Tensor
    edges = ("first_vertical", "first_horizontal", "nearby", "pixel")

    def __init__(
        self,
        shape: ImageShape,
        classes: int = 0,
        *,
        features: int = 32,
        dilations: tuple[int, ...] = (1, 2, 1, 4, 1, 2, 1),
        kernel: int = 3,
        pixel: str = "hierarchical",
        components: int = 10,
        readout: int = 0,
        nearby: int = 0,
    ) -> None:
        super().__init__(shape, classes)
        if kernel % 2 == 0 or kernel < 3:
            raise ValueError(f"the kernel width must be odd and at least 3, not {kernel}")
        half = kernel // 2
        self.register_buffer("position", position(shape), persistent=False)
        inputs = shape.channels + 2
        self.first_vertical = CroppedConv(inputs, features, (half + 1, kernel), half, half)
        self.first_horizontal = CroppedConv(inputs, features, (1, half + 1), half, 0)
        self.layers = nn.ModuleList(GatedLayer(features, kernel, d, classes) for d in dilations)
        self.nearby = Nearby(shape, nearby) if nearby else None
        more = self.nearby.channels if self.nearby else 0
        self.pixel = likelihood(pixel, shape, features, components, hidden=readout, more=more)

    def context(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what each pixel's distribution is conditioned on, (N, M, F, H, W)."""
        x = torch.cat([inputs, self.position.expand(inputs.shape[0], -1, -1, -1)], dim=1)
        # The first layer must not see the present pixel: both stacks start shifted by one.
        v = self.first_vertical(F.pad(x, (0, 0, 1, -1)))
        classes = 1 if labels is None else labels.shape[1]
        h = self.first_horizontal(F.pad(x.repeat_interleave(classes, dim=0), (1, -1, 0, 0)))
        for layer in self.layers:
            v, h = layer(v, h, labels)
        if self.nearby is not None:
            h = torch.cat([h, self.nearby(inputs).repeat_interleave(classes, dim=0)], dim=1)
        return h.unflatten(0, (-1, classes))

    def one_by_one(self) -> tuple[Step, Step]:
        """Return the row's and the pixel's module of the cached sampler."""
        return RowStep(self), PixelStep(self)
