"""Densities of one stack, one pixel at a time: `pixelcnn`, `row-lstm` and `diagonal-bilstm`.

    before each row      RowStep     every layer once more over the row above, now that it is
                                     drawn, and from that what the pixels of this row read of it
    before each pixel    PixelStep   every layer at that pixel, from what it kept of those to the
                                     left

Each layer says itself how it goes over a row and over a pixel (`Layer`). What a row's pixels read
of the rows above is kept as the state, for when the row has been drawn and is gone over again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalyd.density.base import Step
from anomalyd.density.stepwise import inputs_of, packed, unpacked

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anomalyd.density.pixelcnn import PixelCNN
    from anomalyd.density.pixelrnn import PixelRNN

__all__ = ["Layer", "PixelStep", "RowStep"]


class Layer(Protocol):
    """A layer whose features of a pixel depend on rows above, and on pixels to the left."""

    @property
    def above(self) -> int:
        """Channels of what a pixel reads of the rows above."""

    @property
    def left(self) -> int:
        """Channels of what a pixel keeps for the next one."""

    def row(self, x: Tensor, above: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Go over a row: x (N, F, 1, W) to the next layer's, and what the row below sees of it.

        Args:
            x: of the layer before.
            above: (N, `above`, 1, W).
            pixels: (N, C, 1, W), the row itself.
        """

    def below(self, seen: Tensor) -> Tensor:
        """Turn what was seen of a row, zeros above the first, into `above` of the next."""

    def pixel(self, x: Tensor, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Go over a pixel: x (N, F, 1, 1) to the next layer's, and `left` of the next pixel."""


class RowStep(Step):
    """What a row's pixels read of the rows above, layer by layer.

    Args:
        density: of one stack.
        layers: those after its first one.
    """

    def __init__(self, density: PixelCNN | PixelRNN, layers: Iterable[object]) -> None:
        super().__init__()
        self.density = density
        self.layers = cast("list[Layer]", list(layers))
        first, width = density.first, density.shape.width
        _, inputs, rows, _ = first.above.weight.shape
        self.read = [first.above.out_channels, *(layer.above for layer in self.layers)]
        self.kept = [(inputs, rows, width), *((channels, 1, width) for channels in self.read)]
        self.state_size = sum(a * b * c for a, b, c in self.kept)

    def forward(self, row: Tensor, place: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what the row's pixels read of those above; arguments as `stepwise.RowStep`'s."""
        density, first = self.density, self.density.first
        window, above, *others = unpacked(state, self.kept)
        position = density.position.index_select(2, torch.clamp(place - 1, min=0))
        x = inputs_of(density, row.unsqueeze(1), position) * (place > 0)
        window = torch.cat([window[:, :, 1:], x], dim=2)
        terms = [first.above(F.pad(window, first.columns[:1] * 2))]
        x, pixels = above + first.left(F.pad(x, first.columns)), x[:, : density.shape.channels]
        for layer, above in zip(self.layers, others, strict=True):
            x, seen = layer.row(x, above, pixels)
            terms.append(layer.below(seen * (place > 0)))
        return torch.cat(terms, dim=1)[:, :, 0].transpose(1, 2), packed([window, *terms])


class PixelStep(Step):
    """The layers at one pixel, and its distribution.

    Args:
        row: the row's module, whose `above` it reads.
    """

    def __init__(self, row: RowStep) -> None:
        super().__init__()
        self.density, self.layers, self.read = row.density, row.layers, row.read
        _, inputs, _, columns = self.density.first.left.weight.shape
        self.kept = [(inputs, 1, columns), *((layer.left, 1, 1) for layer in self.layers)]
        self.state_size = sum(a * b * c for a, b, c in self.kept)

    def forward(
        self, previous: Tensor, values: Tensor, above: Tensor, place: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the distribution of one pixel; arguments as `stepwise.PixelStep`'s."""
        density = self.density
        window, *others = unpacked(state, self.kept)
        row, column = place[:1], place[1:]
        left = torch.clamp(column - 1, min=0)
        position = density.position.index_select(2, row).index_select(3, left)
        x = inputs_of(density, previous[:, None, None], position) * (column > 0)
        window = torch.cat([window[..., 1:], x], dim=3)
        kept = [window]
        term, *terms = above[:, :, None, None].split(self.read, dim=1)
        x = term + density.first.left(window)
        for layer, term, old in zip(self.layers, terms, others, strict=True):
            x, new = layer.pixel(x, term, old)
            kept.append(new)
        inputs = density.centred(density.quantise(values[:, None, None]))
        return density.pixel.log_probs(density.last(x), inputs)[:, 0, 0], packed(kept)
