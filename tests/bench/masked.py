"""The gated PixelCNN as it is usually written, for the benchmark to compare with.

Kernels are as wide as the receptive field and multiplied by a mask, half of them by zero; a pixel
is a softmax over all its levels, normalised before one is chosen; classes share nothing. Features,
layers, dilations, readout and inputs are those of `anomalyd.density.gated_pixelcnn`, and so, with
its weights, is every number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import Autoregressive, ImageShape, Scores
from anomalyd.density.gated_pixelcnn import GatedPixelCNN
from anomalyd.density.layers import ClassBias, Nearby, gate, position
from anomalyd.density.likelihoods import Categorical

__all__ = ["MaskedGatedPixelCNN", "NllAlone", "from_gated"]


class MaskedConv(nn.Conv2d):
    """A convolution that sees rows above, or columns to the left, and nothing else.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: (rows, columns), odd; one row sees columns to the left, more see rows above.
        first: mask A, without the present row or column; else mask B, with it.
        dilation: distance between kernel taps.
    """

    mask: Tensor

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], first: bool, dilation: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, padding="same", dilation=dilation)
        mask = torch.ones(kernel)
        causal = mask.T if kernel[0] == 1 else mask
        causal[len(causal) // 2 + (not first) :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H, W)."""
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class MaskedLayer(nn.Module):
    """One gated layer of the vertical and the horizontal stack."""

    def __init__(self, features: int, kernel: int, dilation: int, classes: int) -> None:
        super().__init__()
        self.vertical = MaskedConv(features, 2 * features, (kernel, kernel), False, dilation)
        self.horizontal = MaskedConv(features, 2 * features, (1, kernel), False, dilation)
        self.down = nn.Conv2d(2 * features, 2 * features, 1)
        self.out = nn.Conv2d(features, features, 1)
        self.condition = ClassBias(classes, 2 * features) if classes else None

    def forward(self, v: Tensor, h: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map v and h (N, F, H, W) likewise, given the classes (N,)."""
        above = self.vertical(v)
        mixed = self.horizontal(h) + self.down(above)
        if self.condition is not None and labels is not None:
            mixed = mixed + self.condition(labels)
        return gate(*above.chunk(2, dim=1)), h + self.out(gate(*mixed.chunk(2, dim=1)))


class ReadOut(nn.Module):
    """Logits A elu(h) + D elu(U elu(h')) of all levels, where h' has `more` channels than h."""

    def __init__(self, features: int, more: int, hidden: int, levels: int) -> None:
        super().__init__()
        self.direct = nn.Conv2d(features, levels, 1)
        self.up = nn.Conv2d(features + more, hidden, 1)
        self.down = nn.Conv2d(hidden, levels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map elu(h') to logits."""
        return self.direct(x[:, : self.direct.in_channels]) + self.down(F.elu(self.up(x)))


class FullSoftmax(Categorical):
    """A softmax over all levels, in full, of which one is taken.

    Args:
        shape: the image shape.
        features: channels of the context.
        readout: hidden units beside, or 0.
        more: further channels of the context, for them.
    """

    def __init__(self, shape: ImageShape, features: int, readout: int = 0, more: int = 0) -> None:
        super().__init__(shape, features)
        if readout:
            sizes = (features, more, readout, shape.levels)
            self.logits = nn.ModuleList(ReadOut(*sizes) for _ in range(shape.channels))

    def channel(self, seen: Tensor, value: Tensor, channel: int) -> Tensor:
        return self.table(seen, channel).gather(1, value.unsqueeze(1))[:, 0]


class MaskedGatedPixelCNN(Autoregressive):
    """log p(x) or log p(x|y) of a gated PixelCNN with masked kernels and a full softmax.

    References:
        Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016).
    """

    position: Tensor
    edges = ("first_vertical", "first_horizontal", "pixel")

    def __init__(
        self,
        shape: ImageShape,
        classes: int = 0,
        *,
        features: int = 32,
        dilations: tuple[int, ...] = (1, 2, 1, 4, 1, 2, 1),
        kernel: int = 3,
        readout: int = 0,
        nearby: int = 0,
    ) -> None:
        super().__init__(shape, classes)
        self.register_buffer("position", position(shape), persistent=False)
        # Two wider than the others: mask A loses the middle, where the cropped kernel is shifted.
        inputs, wide = shape.channels + 2, kernel + 2
        self.first_vertical = MaskedConv(inputs, features, (wide, wide), True)
        self.first_horizontal = MaskedConv(inputs, features, (1, wide), True)
        self.layers = nn.ModuleList(MaskedLayer(features, kernel, d, classes) for d in dilations)
        self.nearby = Nearby(shape, nearby) if nearby else None
        more = self.nearby.channels if self.nearby else 0
        self.pixel = FullSoftmax(shape, features, readout, more)

    def context(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what each pixel's distribution is conditioned on, (N, M, F, H, W)."""
        x = torch.cat([inputs, self.position.expand(inputs.shape[0], -1, -1, -1)], dim=1)
        classes = 1
        if labels is not None:  # one pass of everything for each class
            classes = labels.shape[1]
            x, labels = x.repeat_interleave(classes, dim=0), labels.flatten()
        v, h = self.first_vertical(x), self.first_horizontal(x)
        for layer in self.layers:
            v, h = layer(v, h, labels)
        if self.nearby is not None:
            h = torch.cat([h, self.nearby(inputs).repeat_interleave(classes, dim=0)], dim=1)
        return h.unflatten(0, (-1, classes))


class NllAlone(nn.Module):
    """Of what a density says of images, the likelihood and its map."""

    def __init__(self, density: Autoregressive) -> None:
        super().__init__()
        self.density, self.shape = density, density.shape

    def forward(self, image: Tensor) -> Scores:
        """Score `image`, uint8 (N, H, W, C)."""
        maps = self.density.nll_maps(image)
        nll = maps.double().sum(dim=(2, 3)).float()
        return Scores(-nll, nll, maps[:, 0])


def from_gated(density: GatedPixelCNN) -> MaskedGatedPixelCNN:
    """Return the masked form of `density`, which has no readout; its weights where categorical."""
    first, layers = density.first_vertical.conv, density.layers
    masked = MaskedGatedPixelCNN(
        density.shape,
        density.classes,
        features=first.out_channels,
        dilations=tuple(layer.vertical.conv.dilation[0] for layer in layers),
        kernel=first.kernel_size[1],
    )
    if isinstance(density.pixel, Categorical):
        own = masked.state_dict()
        for name, weight in density.state_dict().items():
            _embed(weight, own[name.replace(".conv.", ".")])
    return masked


def _embed(weight: Tensor, into: Tensor) -> None:
    """Copy a weight; a cropped kernel to where the mask is one, centred where that is wider."""
    if weight.shape == into.shape:
        into.copy_(weight)
        return
    into.zero_()
    rows, columns = weight.shape[2:]
    # Rows above and columns to the left come first; only mask A is wider in the other direction.
    left = (into.shape[3] - columns) // 2 if into.shape[2] > 1 else 0
    into[:, :, :rows, left : left + columns] = weight
