"""Multi-scale density: a few pixels one by one, then all the others in a few parallel groups.

Every 2^D-th pixel in both directions makes the base, a small image with a density of its own: a
gated PixelCNN. Each of D doublings then fills in the other corners of every 2x2 block, one group
after the other; within a group all pixels are drawn at once.

      1 . 1 .      1 . 1 .      1 3 1 3      1 3 1 3        1  known before the doubling
      . . . .  ->  . 2 . 2  ->  . 2 . 2  ->  4 2 4 2        2  first group: each pixel has its four
      1 . 1 .      1 . 1 .      1 3 1 3      1 3 1 3           diagonal neighbours known,
      . . . .      . 2 . 2      . 2 . 2      4 2 4 2        3, 4  the nearest four

All layers of a doubling work on the coarse grid of its blocks, with a block's known corners as
channels; each group goes on from what the one before it has computed.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import Autoregressive, ImageShape
from anomalyd.density.gated_pixelcnn import GatedLayer
from anomalyd.density.layers import CroppedConv, position
from anomalyd.density.likelihoods import likelihood

__all__ = ["Multiscale"]

CORNERS = ((1, 1), (0, 1), (1, 0))
"""Row and column, in a block of 2x2 pixels, of each group in the order of drawing."""


class Base(nn.Module):
    """Gated layers over a small image in raster order.

    Args:
        shape: the shape of the small image.
        features: channels of each stack.
        layers: gated layers with kernels of three taps.
    """

    position: Tensor

    def __init__(self, shape: ImageShape, features: int, layers: int) -> None:
        super().__init__()
        self.register_buffer("position", position(shape), persistent=False)
        inputs = shape.channels + 2
        self.first_vertical = CroppedConv(inputs, features, (2, 3), 1, 1)
        self.first_horizontal = CroppedConv(inputs, features, (1, 2), 1, 0)
        self.layers = nn.ModuleList(GatedLayer(features, 3, 1, 0) for _ in range(layers))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, C, H, W) in [-1, 1] to the context of each pixel, (N, F, H, W)."""
        x = torch.cat([inputs, self.position.expand(inputs.shape[0], -1, -1, -1)], dim=1)
        # The first layer must not see the present pixel: both stacks start shifted by one.
        v = self.first_vertical(F.pad(x, (0, 0, 1, -1)))
        h = self.first_horizontal(F.pad(x, (1, -1, 0, 0)))
        for layer in self.layers:
            v, h = layer(v, h, None)
        return h


class Residual(nn.Module):
    """h + W relu(V * relu(h)), with a 3x3 kernel V and a 1x1 kernel W."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(features, features, 3, padding=1)
        self.out = nn.Conv2d(features, features, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Map (N, F, H, W) likewise."""
        return h + self.out(F.relu(self.conv(F.relu(h))))


class Doubling(nn.Module):
    """What an image of twice the size adds: contexts of its new pixels, group by group.

    Args:
        shape: the shape of the image with the new pixels.
        features: channels of every layer.
        blocks: residual blocks a group.
    """

    position: Tensor

    def __init__(self, shape: ImageShape, features: int, blocks: int) -> None:
        super().__init__()
        self.shape = shape
        # A side of one pixel has no second half of a block, and so no pixels there.
        self.corners = [(r, c) for r, c in CORNERS if r < shape.height and c < shape.width]
        self.register_buffer("position", position(halved(shape)), persistent=False)
        self.before = nn.Conv2d(features, features, 1)
        self.first = nn.ModuleList(
            nn.Conv2d(shape.channels + (0 if group else 2), features, 3, padding=1)
            for group in range(len(self.corners))
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Residual(features) for _ in range(blocks))) for _ in self.corners
        )
        self.out = nn.ModuleList(nn.Conv2d(features, features, 1) for _ in self.corners)

    def forward(self, inputs: Tensor, context: Tensor) -> Tensor:
        """Return the context of every pixel.

        Args:
            inputs: (N, C, H, W) in [-1, 1], the image with the new pixels.
            context: (N, F, h, w) of the known pixels, one in each block.

        Returns:
            (N, F, H, W).
        """
        height, width = self.shape[:2]
        # Where a side is odd, the last blocks are cut off; what stands in for their missing
        # corners is never a pixel of the result.
        whole = F.pad(inputs, (0, width % 2, 0, height % 2))
        seen = torch.cat(
            [whole[:, :, ::2, ::2], self.position.expand(inputs.shape[0], -1, -1, -1)], dim=1
        )
        h, contexts = self.before(context), {}
        for group, (r, c) in enumerate(self.corners):
            h = self.blocks[group](h + self.first[group](seen))
            contexts[r, c] = self.out[group](h)
            seen = whole[:, :, r::2, c::2]
        block = [context, *(contexts.get(at, context) for at in ((0, 1), (1, 0), (1, 1)))]
        interleaved = F.pixel_shuffle(torch.stack(block, dim=2).flatten(1, 2), 2)
        return interleaved[:, :, :height, :width]


class Multiscale(Autoregressive):
    """log p(x) = log p(base) + sum over groups g of sum_(t in g) log p(x_t | base, groups < g).

    Exact; drawn in C (h w + 3 D) steps, h x w the pixels of the base: 55 for 28x28 grey pixels
    and two doublings.

    References:
        Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016);
        Parallel Multiscale Autoregressive Density Estimation (Reed et al., 2017).

    Args:
        shape: the image shape.
        doublings: D, at most; an image of one pixel is not halved further.
        features: channels of every layer.
        layers: gated layers of the base.
        blocks: residual blocks for each group of a doubling.
        pixel: the distribution of one pixel, a name in `likelihoods`.
        components: logistics in the mixture, where that is chosen.
    """

    def __init__(
        self,
        shape: ImageShape,
        *,
        doublings: int = 2,
        features: int = 48,
        layers: int = 4,
        blocks: int = 1,
        pixel: str = "logistic-mixture",
        components: int = 10,
    ) -> None:
        super().__init__(shape)
        if doublings < 1:
            raise ValueError(f"doublings must be at least 1, not {doublings}")
        shapes = [shape]
        while len(shapes) <= doublings and max(shapes[0][:2]) > 1:
            shapes.insert(0, halved(shapes[0]))
        self.base = Base(shapes[0], features, layers)
        self.doublings = nn.ModuleList(Doubling(fine, features, blocks) for fine in shapes[1:])
        self.pixel = likelihood(pixel, shape, features, components)

    def context(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what each pixel's distribution is conditioned on, (N, 1, F, H, W)."""
        stride = 2 ** len(self.doublings)
        context = self.base(inputs[:, :, ::stride, ::stride])
        for doubling in self.doublings:
            stride //= 2
            context = doubling(inputs[:, :, ::stride, ::stride], context)
        return context.unsqueeze(1)

    @property
    def order(self) -> Tensor:
        """The step of each value: the base row by row, then a step for each group and channel."""
        height, width = self.base.position.shape[2:]
        step = torch.arange(height * width).reshape(height, width)
        steps = height * width
        for doubling in cast("list[Doubling]", self.doublings):
            known, step = step, torch.empty(doubling.shape[:2], dtype=torch.int64)
            step[::2, ::2] = known
            for r, c in doubling.corners:
                step[r::2, c::2] = steps
                steps += 1
        channels = self.shape.channels
        return step.unsqueeze(2) * channels + torch.arange(channels)


def halved(shape: ImageShape) -> ImageShape:
    """Return the shape of every second pixel of every second row."""
    return ImageShape(-(-shape.height // 2), -(-shape.width // 2), *shape[2:])
