"""The gated PixelCNN one pixel at a time: the same weights, every activation computed once.

    before each row      RowStep     the vertical stack of that row, from the rows kept of before
    before each pixel    PixelStep   the horizontal stack of that pixel, from the columns kept

Row by row the convolutions need only their last few rows of input, pixel by pixel their last few
columns: the states. A state is one float32 (N, S) tensor, zero before the first row or column,
which is what the padding of the convolutions is.

References:
    Fast Generation for Convolutional Autoregressive Models (Ramachandran et al., 2017).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalyd.density.base import Step
from anomalyd.density.layers import CroppedConv, gate

if TYPE_CHECKING:
    from anomalyd.density.base import Model
    from anomalyd.density.gated_pixelcnn import GatedLayer, GatedPixelCNN

__all__ = ["PixelStep", "RowStep", "inputs_of", "packed", "row_of", "unpacked"]


class RowStep(Step):
    """The vertical stack of one row."""

    def __init__(self, density: GatedPixelCNN) -> None:
        super().__init__()
        self.density = density
        width = density.shape.width
        first = density.first_vertical.conv
        self.kept = [(first.in_channels, first.kernel_size[0], width)]
        for layer in _layers(density):
            conv = layer.vertical.conv
            rows = (conv.kernel_size[0] - 1) * conv.dilation[0]
            self.kept.append((conv.in_channels, rows, width))
        self.state_size = sum(a * b * c for a, b, c in self.kept)

    def forward(self, row: Tensor, place: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what the row's pixels read of the rows above them.

        Args:
            row: uint8 (N, W, C), the row above, as drawn; not read for the first row.
            place: int64 (1,), the number of the row.
            state: float32 (N, S).

        Returns:
            above: float32 (N, W, A), and the next state (N, S).
        """
        density = self.density
        states = unpacked(state, self.kept)
        above = torch.clamp(place - 1, min=0)
        x = inputs_of(density, row.unsqueeze(1), density.position.index_select(2, above))
        x = x * (place > 0)
        window = torch.cat([states[0][:, :, 1:], x], dim=2)
        kept, links = [window], []
        v = row_of(density.first_vertical, window)
        for layer, rows in zip(_layers(density), states[1:], strict=True):
            window = torch.cat([rows, v], dim=2)
            kept.append(window[:, :, 1:])
            seen = row_of(layer.vertical, window)
            links.append(layer.down(seen))
            v = gate(*seen.chunk(2, dim=1))
        if density.nearby is not None:
            vectors = density.nearby.of_each(x[:, : density.shape.channels]) * (place > 0)
            links += [F.pad(vectors, (left, right)) for left, right in ((1, -1), (0, 0), (-1, 1))]
        linked = torch.cat(links, dim=1)[:, :, 0].transpose(1, 2)
        return linked, packed(kept)


class PixelStep(Step):
    """The horizontal stack of one pixel, and its distribution."""

    labelled = True

    def __init__(self, density: GatedPixelCNN) -> None:
        super().__init__()
        self.density = density
        first = density.first_horizontal.conv
        self.kept = [(first.in_channels, 1, first.kernel_size[1])]
        for layer in _layers(density):
            conv = layer.horizontal.conv
            columns = (conv.kernel_size[1] - 1) * conv.dilation[1]
            self.kept.append((conv.in_channels, 1, columns))
        self.state_size = sum(a * b * c for a, b, c in self.kept)

    def forward(
        self,
        previous: Tensor,
        values: Tensor,
        above: Tensor,
        place: Tensor,
        state: Tensor,
        label: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the distribution of one pixel.

        Args:
            previous: uint8 (N, C), the pixel to the left; not read in the first column.
            values: uint8 (N, C), the channels of this pixel drawn so far.
            above: float32 (N, A), this column of `RowStep`'s.
            place: int64 (2,), row and column.
            state: float32 (N, S), zero in the first column.
            label: int64 (N,), with classes.

        Returns:
            log_probs: float32 (N, C, levels), and the next state (N, S).
        """
        density = self.density
        states = unpacked(state, self.kept)
        row, column = place[:1], place[1:]
        left = torch.clamp(column - 1, min=0)
        position = density.position.index_select(2, row).index_select(3, left)
        x = inputs_of(density, previous[:, None, None], position) * (column > 0)
        window = torch.cat([states[0][..., 1:], x], dim=3)
        kept = [window]
        h = density.first_horizontal.conv(window)
        layers = _layers(density)
        widths = [layer.down.out_channels for layer in layers]
        *links, nearby = above[:, :, None, None].split(
            [*widths, above.shape[1] - sum(widths)], dim=1
        )
        for layer, columns, link in zip(layers, states[1:], links, strict=True):
            window = torch.cat([columns, h], dim=3)
            kept.append(window[..., 1:])
            mixed = layer.horizontal.conv(window) + link
            if layer.condition is not None and label is not None:
                mixed = mixed + layer.condition(label.unsqueeze(1))[:, 0]
            h = h + layer.out(gate(*mixed.chunk(2, dim=1)))
        if density.nearby is not None:
            vectors = density.nearby.of_each(x[:, : density.shape.channels]) * (column > 0)
            h = torch.cat([h, vectors, nearby], dim=1)
        inputs = density.centred(density.quantise(values[:, None, None]))
        return density.pixel.log_probs(h, inputs)[:, 0, 0], packed(kept)


def _layers(density: GatedPixelCNN) -> list[GatedLayer]:
    return cast("list[GatedLayer]", list(density.layers))


def inputs_of(density: Model, images: Tensor, position: Tensor) -> Tensor:
    """Return what a first layer reads of uint8 (N, h, w, C), values and position."""
    values = density.centred(density.quantise(images))
    return torch.cat([values, position.expand(images.shape[0], -1, -1, -1)], dim=1)


def row_of(module: CroppedConv, window: Tensor) -> Tensor:
    """Convolve kept rows (N, C, rows, W), padded to the sides as ever, into one row."""
    left, right, *_ = module.padding
    return module.conv(F.pad(window, (left, right)))


def unpacked(state: Tensor, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    """Cut a state (N, S) into tensors (N, *shape)."""
    parts = state.split([a * b * c for a, b, c in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def packed(states: list[Tensor]) -> Tensor:
    """Undo `unpacked`."""
    return torch.cat([state.flatten(1) for state in states], dim=1)
