"""The PixelCNN++ one pixel at a time: the same weights, each stream as soon as it can be.

    before each row      RowStep     ul of the row above, all of which is drawn; u of this row
    before each pixel    PixelStep   ul of that pixel

Every kernel reads two rows. What it reads of the upper one RowStep adds up for all columns, which
leaves PixelStep the present pixel and the one to its left. For that it goes over the row above
once more, which costs little beside having drawn it pixel by pixel.

A resolution that was halved l times moves on with every 2^l-th row and column. In between its
states stand, and the next higher resolution reads what it was handed then.

References:
    Fast Generation for Convolutional Autoregressive Models (Ramachandran et al., 2017).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalyd.density.base import Step
from anomalyd.density.stepwise import inputs_of, packed, row_of, unpacked

if TYPE_CHECKING:
    from torch import nn

    from anomalyd.density.layers import CroppedConv
    from anomalyd.density.pixelcnnpp import Block, Both, Pair, PixelCNNPP

__all__ = ["PixelStep", "RowStep"]

Shape = tuple[int, int, int]


class RowStep(Step):
    """Stream u of one row, and what the pixels of that row read of the row above."""

    labelled = True

    def __init__(self, density: PixelCNNPP) -> None:
        super().__init__()
        self.density = density
        drawn = torch.zeros(1, density.shape.width, density.shape.channels, dtype=torch.uint8)
        with torch.no_grad():
            parts = self.advance(drawn, torch.zeros(1, dtype=torch.int64), [[], [], []], None)
        self.kept = [_shapes(part) for part in parts]
        self.state_size = sum(map(_size, self.kept))

    def forward(
        self, row: Tensor, place: Tensor, state: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute what the row's pixels read of those above; arguments as `stepwise.RowStep`'s."""
        states = state.split([_size(shapes) for shapes in self.kept], dim=1)
        old = [unpacked(*pair) for pair in zip(states, self.kept, strict=True)]
        rows, upper, beside = self.advance(row, place, old, label)
        width = self.density.shape.width
        above = torch.cat([_stretched(part, width) for part in upper + beside], dim=1)
        return above[:, :, 0].transpose(1, 2), packed(rows + upper + beside)

    def advance(
        self, row: Tensor, place: Tensor, old: list[list[Tensor]], label: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the rows that u keeps, what ul reads of the row above, and what of u beside it.

        `old` is what it returned for the row before, empty for the first.
        """
        density, (rows, upper, beside) = self.density, old
        above = torch.clamp(place - 1, min=0)
        x = inputs_of(density, row.unsqueeze(1), density.position.index_select(2, above))
        x = x * (place > 0)
        # At the first row there is no row above, and nothing moves on.
        again = _RowOfUL(density, _moves(density, place - 1), upper, beside, label)
        density.passes(again.first(x), again)
        walk = _RowOfU(density, _moves(density, place), rows)
        density.passes(walk.conv(density.first_u, x, 0), walk)
        return walk.kept.new, again.kept.new, walk.beside


class PixelStep(Step):
    """Stream ul of one pixel, and its distribution.

    Args:
        row: the row's module, whose `above` it reads.
    """

    labelled = True

    def __init__(self, row: RowStep) -> None:
        super().__init__()
        self.density = row.density
        _, upper, beside = row.kept
        self.upper, self.read = len(upper), [channels for channels, _, _ in upper + beside]
        with torch.no_grad():
            _, kept = self.advance(
                torch.zeros(1, self.density.shape.channels, dtype=torch.uint8),
                torch.zeros(1, sum(self.read)),
                torch.zeros(2, dtype=torch.int64),
                [],
                None,
            )
        self.kept = _shapes(kept)
        self.state_size = _size(self.kept)

    def forward(
        self,
        previous: Tensor,
        values: Tensor,
        above: Tensor,
        place: Tensor,
        state: Tensor,
        label: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the distribution of one pixel; arguments as `stepwise.PixelStep`'s."""
        density, old = self.density, unpacked(state, self.kept)
        context, kept = self.advance(previous, above, place, old, label)
        inputs = density.centred(density.quantise(values[:, None, None]))
        return density.pixel.log_probs(context, inputs)[:, 0, 0], packed(kept)

    def advance(
        self,
        previous: Tensor,
        above: Tensor,
        place: Tensor,
        old: list[Tensor],
        label: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return what the pixel's distribution is conditioned on, and what ul keeps of it."""
        density, row, column = self.density, place[:1], place[1:]
        left = torch.clamp(column - 1, min=0)
        position = density.position.index_select(2, row).index_select(3, left)
        x = inputs_of(density, previous[:, None, None], position) * (column > 0)
        parts = list(above[:, :, None, None].split(self.read, dim=1))
        upper, beside = parts[: self.upper], parts[self.upper :]
        rows, columns = _moves(density, row), _moves(density, column)
        walk = _PixelOfUL(density, rows, columns, upper, beside, old, label)
        return density.passes(walk.first(x), walk), walk.kept.new


class _Kept:
    """States in the order of a pass, each replaced where its resolution moves on.

    Args:
        old: the states; without any, they are zero, as padding is.
    """

    def __init__(self, old: list[Tensor]) -> None:
        self.old, self.new = iter(old), list[Tensor]()

    def swap(self, new: Tensor, moves: Tensor) -> Tensor:
        """Return the next old state; keep the new one in its place where that moves on."""
        old = next(self.old, None)
        old = torch.zeros_like(new) if old is None else old
        self.new.append(torch.where(moves, new, old))
        return old


class _RowOfU:
    """A pass of u over one row, (N, F, 1, W); `beside` is what ul reads of it."""

    def __init__(self, density: PixelCNNPP, moves: list[Tensor], rows: list[Tensor]) -> None:
        self.width, self.moves, self.kept = density.shape.width, moves, _Kept(rows)
        self.beside: list[Tensor] = []

    def conv(self, module: CroppedConv, x: Tensor, level: int) -> Tensor:
        return row_of(module, torch.cat([self.kept.swap(x, self.moves[level]), x], dim=2))

    def down(self, both: Both, x: Tensor, level: int) -> Tensor:
        return self.conv(cast("CroppedConv", both.u), x, level - 1)

    def block(self, pair: Pair, x: Tensor, level: int, shortcut: Tensor | None) -> Tensor:
        terms = [] if shortcut is None else [pair.u.beside[0](shortcut)]
        x = _through(self, pair.u, x, level, terms, None)
        self.beside.append(pair.ul.beside[0](x))
        return x

    def up(self, both: Both, x: Tensor, level: int) -> Tensor:
        return _two_rows(both.u, x, level, self.width, self.kept, self.moves[level])


class _UL:
    """A pass of ul; `conv` and `up` differ between a row and a pixel."""

    def __init__(self, density: PixelCNNPP, beside: list[Tensor], label: Tensor | None) -> None:
        self.density, self.beside, self.label = density, iter(beside), label

    def conv(self, module: CroppedConv, x: Tensor, level: int) -> Tensor:
        raise NotImplementedError

    def down(self, both: Both, x: Tensor, level: int) -> Tensor:
        return self.conv(cast("CroppedConv", both.ul), x, level - 1)

    def block(self, pair: Pair, x: Tensor, level: int, shortcut: Tensor | None) -> Tensor:
        # There is none when a module is made, which goes through once to learn the shapes.
        terms = [*itertools.islice(self.beside, 1)]
        if shortcut is not None:
            terms.append(pair.ul.beside[1](shortcut))
        return _through(self, pair.ul, x, level, terms, self.label)

    def present(self, left: Tensor) -> Tensor:
        """Return what the first layer reads of this row, shifted by one column."""
        above, conv = self.density.first_above.conv, self.density.first_left.conv
        bias = cast("Tensor", conv.bias) + cast("Tensor", above.bias)
        return F.conv2d(left, conv.weight[:, :, 1:], bias)


class _RowOfUL(_UL):
    """A pass of ul over one row, (N, F, 1, W), that keeps what the next row reads of it."""

    def __init__(
        self,
        density: PixelCNNPP,
        moves: list[Tensor],
        upper: list[Tensor],
        beside: list[Tensor],
        label: Tensor | None,
    ) -> None:
        super().__init__(density, beside, label)
        self.moves, self.kept = moves, _Kept(upper)

    def first(self, x: Tensor) -> Tensor:
        left = F.pad(x, (1, -1))
        upper = F.conv2d(left, self.density.first_left.conv.weight[:, :, :1])
        upper = upper + F.conv2d(F.pad(x, (1, 1)), self.density.first_above.conv.weight)
        return self.kept.swap(upper, self.moves[0]) + self.present(left)

    def conv(self, module: CroppedConv, x: Tensor, level: int) -> Tensor:
        x, (_, stride) = F.pad(x, (1, 0)), module.conv.stride
        weight, bias = module.conv.weight, module.conv.bias
        upper = F.conv2d(x, weight[:, :, :1], stride=(1, stride))
        lower = F.conv2d(x, weight[:, :, 1:], bias, stride=(1, stride))
        return self.kept.swap(upper, self.moves[level]) + lower

    def up(self, both: Both, x: Tensor, level: int) -> Tensor:
        width = self.density.shape.width
        return _two_rows(both.ul, x, level, width, self.kept, self.moves[level])


class _PixelOfUL(_UL):
    """A pass of ul over one pixel, (N, F, 1, 1)."""

    def __init__(
        self,
        density: PixelCNNPP,
        rows: list[Tensor],
        columns: list[Tensor],
        upper: list[Tensor],
        beside: list[Tensor],
        old: list[Tensor],
        label: Tensor | None,
    ) -> None:
        super().__init__(density, beside, label)
        self.rows, self.columns, self.upper, self.kept = rows, columns, iter(upper), _Kept(old)

    def first(self, x: Tensor) -> Tensor:
        return next(self.upper) + self.present(x)

    def conv(self, module: CroppedConv, x: Tensor, level: int) -> Tensor:
        window = torch.cat([self.kept.swap(x, self.columns[level]), x], dim=3)
        lower = F.conv2d(window, module.conv.weight[:, :, 1:], module.conv.bias)
        return next(self.upper) + lower

    def up(self, both: Both, x: Tensor, level: int) -> Tensor:
        now, later = both.ul(x)[:, :, :1].chunk(2, dim=3)
        moves = self.columns[level]
        here = torch.where(moves, now, self.kept.swap(later, moves))
        # The second of two rows reads what the first handed up.
        return torch.where(self.rows[level], here, next(self.upper))


def _moves(density: PixelCNNPP, place: Tensor) -> list[Tensor]:
    """Tell for each resolution whether it moves on at a row or column: bool (1,)."""
    return [(place >= 0) & (place % 2**level == 0) for level in range(len(density.down))]


def _through(
    walk: _RowOfU | _UL,
    block: Block,
    x: Tensor,
    level: int,
    terms: list[Tensor],
    label: Tensor | None,
) -> Tensor:
    """Go through a block: as its own `forward`, the tensors beside it given as terms."""
    elu, first = block.first
    hidden = walk.conv(cast("CroppedConv", first), elu(x), level)
    for term in terms:
        hidden = hidden + term
    elu, _, second = block.second
    hidden = walk.conv(cast("CroppedConv", second), elu(hidden), level)
    if block.condition is not None and label is not None:
        hidden = hidden + block.condition(label.unsqueeze(1))[:, 0]
    a, b = hidden.chunk(2, dim=1)
    return x + a * torch.sigmoid(b)


def _two_rows(
    double: nn.Module, x: Tensor, level: int, width: int, kept: _Kept, moves: Tensor
) -> Tensor:
    """Double a row's resolution: the first of two rows where it moves on, else the one kept."""
    columns = -(-width // 2 ** (level - 1))
    now, later = double(x)[..., :columns].chunk(2, dim=2)
    return torch.where(moves, now, kept.swap(later, moves))


def _stretched(part: Tensor, width: int) -> Tensor:
    """Hand each column of a halved resolution to those of the full one: (N, F, 1, width)."""
    times = 1
    while -(-width // times) > part.shape[3]:
        times *= 2
    return part[..., torch.arange(width) // times]


def _shapes(tensors: list[Tensor]) -> list[Shape]:
    return [cast("Shape", tuple(tensor.shape[1:])) for tensor in tensors]


def _size(shapes: list[Shape]) -> int:
    return sum(a * b * c for a, b, c in shapes)
