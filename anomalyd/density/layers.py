"""Building blocks that several densities share: causal convolutions, position, class terms."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import ImageShape

__all__ = [
    "ClassBias",
    "CroppedConv",
    "Nearby",
    "gate",
    "halves",
    "levels_of",
    "per_class",
    "position",
]


class CroppedConv(nn.Module):
    """A convolution over pixels above, or to the left, whose kernel holds no zeros.

    A masked kernel would multiply its lower half by zero; here it is cropped to the half that
    counts, and the input is padded (shifted) instead.

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
        return self.conv(self.padded(x))

    def padded(self, x: Tensor) -> Tensor:
        """Return the input with zeros around it, so that the convolution keeps its size."""
        return F.pad(x, self.padding)


class ClassBias(nn.Module):
    """V y: a learned vector for each class, zero at first."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.of_class = nn.Embedding(classes, features)
        nn.init.zeros_(self.of_class.weight)

    def forward(self, labels: Tensor) -> Tensor:
        """Map labels (N, M) to (N, M, features, 1, 1)."""
        return self.of_class(labels)[..., None, None]


class Nearby(nn.Module):
    """The levels of the four nearest pixels before each, as learned vectors.

    A convolution reads a level as one number among many; here each level is told from its
    neighbours exactly, so that what follows can say "253, as on the left".

    Args:
        shape: the image shape.
        size: numbers a level.
    """

    shifts = ((1, -1, 0, 0), (1, -1, 1, -1), (0, 0, 1, -1), (-1, 1, 1, -1))
    """Paddings that put in a pixel's place the one left, above left, above and above right."""

    def __init__(self, shape: ImageShape, size: int) -> None:
        super().__init__()
        self.levels = shape.levels
        self.vectors = nn.Embedding(shape.channels * shape.levels, size)
        self.channels = len(self.shifts) * shape.channels * size

    def of_each(self, inputs: Tensor) -> Tensor:
        """Map values (N, C, H, W) in [-1, 1] to their vectors, (N, C * size, H, W)."""
        first = self.levels * torch.arange(inputs.shape[1], device=inputs.device)
        vectors = self.vectors(levels_of(inputs, self.levels) + first.reshape(-1, 1, 1))
        return vectors.permute(0, 1, 4, 2, 3).flatten(1, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map values (N, C, H, W) in [-1, 1] to (N, channels, H, W); zero beyond the image."""
        vectors = self.of_each(inputs)
        return torch.cat([F.pad(vectors, shift) for shift in self.shifts], dim=1)


def halves(conv: nn.Conv2d, *parts: Tensor) -> list[Tensor]:
    """Convolve an input given in equal parts of its channels; give the output in two halves.

    Cutting it in two afterwards costs more: torch would go on with strided views, and onnxruntime
    leaves its blocked layout to cut or to join channels.

    Args:
        conv: an unpadded convolution of stride 1.
        parts: each (N, channels / number of parts, H, W).

    Returns:
        both halves of the output channels.
    """
    found = []
    for weight, bias in zip(conv.weight.chunk(2), cast("Tensor", conv.bias).chunk(2), strict=True):
        first, *others = weight.chunk(len(parts), dim=1)
        half = F.conv2d(parts[0], first, bias, dilation=conv.dilation)
        for part, other in zip(parts[1:], others, strict=True):
            half = half + F.conv2d(part, other, dilation=conv.dilation)
        found.append(half)
    return found


def gate(a: Tensor, b: Tensor) -> Tensor:
    """Return tanh(a) * sigmoid(b)."""
    return torch.tanh(a) * torch.sigmoid(b)


def levels_of(inputs: Tensor, levels: int) -> Tensor:
    """Map values in [-1, 1] back to int64 levels, what `Model.centred` undoes."""
    return torch.round((inputs + 1) * ((levels - 1) / 2)).long()


def per_class(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module of (N, F, H, W) to (N, M, F, H, W), class by class."""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def position(shape: ImageShape) -> Tensor:
    """Return row and column as two channels, (1, 2, H, W), from 1/2 to 3/2.

    Never zero, so that they also tell padding from a mid-grey pixel.
    """
    rows = torch.linspace(0.5, 1.5, shape.height).reshape(-1, 1).expand(shape[:2])
    columns = torch.linspace(0.5, 1.5, shape.width).expand(shape[:2])
    return torch.stack([rows, columns]).unsqueeze(0)
