"""PixelCNN++: two streams of gated residual blocks, down to low resolution and up again.

The stream u sees the rows above; ul sees those and, to the left, the pixels of this row. Once the
first layer has shifted both, their kernels end at the present feature, x:

      u u u      l l
      u x u      l x

Halving the resolution puts the feature of (2i, 2j) at (i, j); doubling it hands that back to the
four of (2i, 2j) to (2i+1, 2j+1), none of which comes earlier than (2i, 2j). So the order is kept,
at a price: low resolution tells (2i+1, 2j) nothing of its own row, and of the row above nothing
from 2j on; there it sees as far as the blocks of full resolution do. Shortcuts carry every state
of the downward pass to the upward one.

A class enters every block of ul, as a bias before the gate. The stream u is the same for all
classes and is computed once for all of them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import Autoregressive, ImageShape, Step
from anomalyd.density.layers import ClassBias, CroppedConv, per_class, position
from anomalyd.density.likelihoods import likelihood
from anomalyd.density.stepwise_pp import PixelStep, RowStep

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Both", "Pair", "PixelCNNPP"]

_T = TypeVar("_T")
_Streams = tuple[Tensor, Tensor]

# The cropped kernel of each stream, and its padding to the left and to the right.
Window = tuple[tuple[int, int], int, int]
U: Window = ((2, 3), 1, 1)
UL: Window = ((2, 2), 1, 0)


class ConcatELU(nn.Module):
    """elu(x) and elu(-x): twice the channels, and a gradient on either side of zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, F, H, W) to (N, 2F, H, W)."""
        return F.elu(torch.cat([x, -x], dim=1))


class Block(nn.Module):
    """x + a sigmoid(b), where (a, b) are two shifted convolutions of x and of what is beside it.

    Args:
        features: channels.
        window: `U` or `UL`.
        beside: how many other tensors of as many channels it reads, pixel by pixel.
        dropout: share of the hidden features set to zero in training.
        classes: K, or 0.
    """

    def __init__(
        self, features: int, window: Window, *, beside: int, dropout: float, classes: int = 0
    ) -> None:
        super().__init__()
        self.first = nn.Sequential(ConcatELU(), CroppedConv(2 * features, features, *window))
        self.beside = nn.ModuleList(
            nn.Sequential(ConcatELU(), nn.Conv2d(2 * features, features, 1, bias=False))
            for _ in range(beside)
        )
        self.second = nn.Sequential(
            ConcatELU(),
            nn.Dropout(dropout),
            CroppedConv(2 * features, 2 * features, *window),
        )
        self.condition = ClassBias(classes, 2 * features) if classes else None

    def forward(self, x: Tensor, *beside: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map x and the tensors beside it, (N, M or 1, F, H, W), to (N, M or 1, F, H, W)."""
        hidden = per_class(self.first, x)
        for module, other in zip(self.beside, beside, strict=True):
            hidden = hidden + per_class(module, other)
        hidden = per_class(self.second, hidden)
        if self.condition is not None and labels is not None:
            hidden = hidden + self.condition(labels)
        a, b = hidden.chunk(2, dim=2)
        return x + a * torch.sigmoid(b)


class Pair(nn.Module):
    """A block of each stream; ul reads u, and on the way up both read their shortcut."""

    def __init__(self, features: int, *, shortcut: bool, dropout: float, classes: int) -> None:
        super().__init__()
        self.u = Block(features, U, beside=int(shortcut), dropout=dropout)
        self.ul = Block(features, UL, beside=1 + shortcut, dropout=dropout, classes=classes)

    def forward(
        self,
        u: Tensor,
        ul: Tensor,
        labels: Tensor | None,
        shortcut: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map u (N, 1, F, H, W) and ul (N, M or 1, F, H, W) likewise."""
        if shortcut is None:
            u = self.u(u)
            return u, self.ul(ul, u, labels=labels)
        u = self.u(u, shortcut[0])
        return u, self.ul(ul, u, shortcut[1], labels=labels)


class Downsample(CroppedConv):
    """A shifted convolution at every second row and column: sides n to (n + 1) // 2."""

    def __init__(self, inputs: int, outputs: int, window: Window) -> None:
        super().__init__(inputs, outputs, *window)
        self.conv.stride = (2, 2)


class Upsample(nn.ConvTranspose2d):
    """A feature at (i, j) to four at (2i, 2j) .. (2i+1, 2j+1)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, kernel_size=2, stride=2)


class Both(nn.Module):
    """A change of resolution of each stream."""

    def __init__(self, u: nn.Module, ul: nn.Module) -> None:
        super().__init__()
        self.u, self.ul = u, ul

    def forward(self, u: Tensor, ul: Tensor) -> tuple[Tensor, Tensor]:
        """Map u (N, 1, F, H, W) and ul (N, M or 1, F, H, W) to another F, H and W."""
        return per_class(self.u, u), per_class(self.ul, ul)


class Walk(Protocol[_T]):
    """What a pass does to the states that it goes through, of both streams or of one."""

    def down(self, both: Both, x: _T, level: int) -> _T:
        """Halve the resolution, to that of `level`."""

    def block(self, pair: Pair, x: _T, level: int, shortcut: _T | None) -> _T:
        """Go through a block at the resolution of `level`."""

    def up(self, both: Both, x: _T, level: int) -> _T:
        """Double the resolution, from that of `level`."""


class _Whole:
    """Both streams over whole images: u (N, 1, F, H, W) and ul (N, M or 1, F, H, W)."""

    def __init__(self, shape: ImageShape, labels: Tensor | None) -> None:
        self.shape, self.labels = shape, labels

    def down(self, both: Both, x: _Streams, level: int) -> _Streams:
        return both(*x)

    def block(self, pair: Pair, x: _Streams, level: int, shortcut: _Streams | None) -> _Streams:
        return pair(*x, self.labels, shortcut)

    def up(self, both: Both, x: _Streams, level: int) -> _Streams:
        rows, columns = (-(-side // 2 ** (level - 1)) for side in self.shape[:2])
        u, ul = both(*x)
        return u[..., :rows, :columns], ul[..., :rows, :columns]


class PixelCNNPP(Autoregressive):
    """log p(x) or log p(x|y) = sum_t log p(x_t | x_<t, y), exact, over pixels in raster order.

    References:
        PixelCNN++ (Salimans, Karpathy, Chen, Kingma, 2017).

    Args:
        shape: the image shape.
        classes: K for p(x|y), 0 for p(x).
        features: channels of each stream, for each resolution, the full one first.
        blocks: blocks of the downward pass, likewise; the upward pass has one more for each
            resolution but the lowest.
        dropout: share of the hidden features of each block set to zero in training.
        pixel: the distribution of one pixel, a name in `likelihoods`.
        components: logistics in the mixture, where that is chosen.
    """

    position: Tensor
    edges = ("first_u", "first_above", "first_left", "pixel")

    def __init__(
        self,
        shape: ImageShape,
        classes: int = 0,
        *,
        features: tuple[int, ...] = (16, 32, 64),
        blocks: tuple[int, ...] = (1, 1, 1),
        dropout: float = 0.0,
        pixel: str = "logistic-mixture",
        components: int = 10,
    ) -> None:
        super().__init__(shape, classes)
        if not features or len(features) != len(blocks):
            raise ValueError(
                f"features and blocks hold one number for each resolution, not {len(features)} "
                f"and {len(blocks)}"
            )
        self.register_buffer("position", position(shape), persistent=False)
        inputs, full = shape.channels + 2, features[0]
        self.first_u = CroppedConv(inputs, full, *U)
        self.first_above = CroppedConv(inputs, full, (1, 3), 1, 1)
        self.first_left = CroppedConv(inputs, full, (2, 1), 0, 0)

        def pairs(level: int, count: int, *, shortcut: bool) -> nn.ModuleList:
            return nn.ModuleList(
                Pair(features[level], shortcut=shortcut, dropout=dropout, classes=classes)
                for _ in range(count)
            )

        lowest = len(features) - 1
        self.down = nn.ModuleList(pairs(i, n, shortcut=False) for i, n in enumerate(blocks))
        self.up = nn.ModuleList(
            pairs(i, n + (i < lowest), shortcut=True) for i, n in enumerate(blocks)
        )
        steps = list(itertools.pairwise(features))
        self.downsample = nn.ModuleList(
            Both(Downsample(high, low, U), Downsample(high, low, UL)) for high, low in steps
        )
        self.upsample = nn.ModuleList(
            Both(Upsample(low, high), Upsample(low, high)) for high, low in steps
        )
        self.pixel = likelihood(pixel, shape, full, components)

    def context(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what each pixel's distribution is conditioned on, (N, M, F, H, W)."""
        x = torch.cat([inputs, self.position.expand(inputs.shape[0], -1, -1, -1)], dim=1)
        # The first layer must not see the present pixel: each stream starts shifted by one.
        above, left = F.pad(x, (0, 0, 1, -1)), F.pad(x, (1, -1, 0, 0))
        u = self.first_u(above).unsqueeze(1)
        ul = (self.first_above(above) + self.first_left(left)).unsqueeze(1)
        return self.passes((u, ul), _Whole(self.shape, labels))[1]

    def passes(self, x: _T, walk: Walk[_T]) -> _T:
        """Go down to the lowest resolution and up again, and return the last state.

        Args:
            x: the first state: of both streams, or of one.
            walk: what is done there; the shortcuts are kept here.
        """
        states = [x]
        for level, pairs in enumerate(self.down):
            if level:
                x = walk.down(cast("Both", self.downsample[level - 1]), x, level)
                states.append(x)
            for pair in cast("Iterable[Pair]", pairs):
                x = walk.block(pair, x, level, None)
                states.append(x)
        x = states.pop()
        for level in reversed(range(len(self.up))):
            for pair in cast("Iterable[Pair]", self.up[level]):
                x = walk.block(pair, x, level, states.pop())
            if level:
                x = walk.up(cast("Both", self.upsample[level - 1]), x, level)
        return x

    def one_by_one(self) -> tuple[Step, Step]:
        """Return the row's and the pixel's module of the cached sampler."""
        row = RowStep(self)
        return row, PixelStep(row)
