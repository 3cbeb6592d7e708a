"""PixelRNN: LSTM layers that walk over the image, one row or one diagonal of pixels a step.

Both layers are one recurrence, a convolutional LSTM over lines of pixels: what a line's gates take
from the image is computed for all lines at once, and a step adds to that a short convolution over
the hidden state of the line before.

      Row LSTM: H steps         Diagonal BiLSTM: H + W - 1 steps, and its mirror image

      s s s s s                 . . s .      skewed, row r by r columns:   . . s . . .
      . s s s .                 . s x .                                    . . s x . .
      . . x . .                 s x . .                                    . . s x . .

A row sees a triangle above it. The diagonals see everything above and to the left, their mirror
image everything above and to the right: its output goes one row down, below what it has seen.

Inside, maps are (features, H, W, N): with images last, every slice of a step is contiguous. Only
the methods of the cached sampler, `row`, `below` and `pixel`, go by (N, features, 1, W).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from anomalyd.density.base import Autoregressive, ImageShape, Step
from anomalyd.density.layers import position
from anomalyd.density.likelihoods import likelihood
from anomalyd.density.pixelcnn import MaskedConv
from anomalyd.density.stepwise_stack import PixelStep, RowStep

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DiagonalBiLSTM", "RowLSTM"]


class PixelRNN(Autoregressive):
    """log p(x) = sum_t log p(x_t | x_<t): a 7x7 mask A convolution, residual LSTM layers, pixels.

    Args:
        shape: the image shape.
        features: h, the features of a hidden state; the maps between layers have 2h.
        layers: LSTM layers.
        pixel: the distribution of one pixel, a name in `likelihoods`.
        components: logistics in the mixture, where that is chosen.
    """

    position: Tensor
    layer: type[nn.Module]
    edges = ("first", "pixel")

    def __init__(
        self,
        shape: ImageShape,
        *,
        features: int = 32,
        layers: int = 3,
        pixel: str = "hierarchical",
        components: int = 10,
    ) -> None:
        super().__init__(shape)
        if features < 1 or layers < 1:
            raise ValueError(
                f"features and layers must be at least 1, not {features} and {layers}"
            )
        self.register_buffer("position", position(shape), persistent=False)
        self.first = MaskedConv(shape.channels + 2, 2 * features, 7, "A")
        self.layers = nn.ModuleList(self.layer(features, shape.channels) for _ in range(layers))
        self.last = nn.Sequential(nn.ELU(), nn.Conv2d(2 * features, 2 * features, 1))
        self.pixel = likelihood(pixel, shape, 2 * features, components)

    def context(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what each pixel's distribution is conditioned on, (N, 1, F, H, W)."""
        x = torch.cat([inputs, self.position.expand(inputs.shape[0], -1, -1, -1)], dim=1)
        x, inputs = (values.permute(1, 2, 3, 0) for values in (self.first(x), inputs))
        for layer in self.layers:
            x = layer(x, inputs)
        return self.last(x.permute(3, 0, 1, 2)).unsqueeze(1)

    def one_by_one(self) -> tuple[Step, Step]:
        """Return the row's and the pixel's module of the cached sampler."""
        row = RowStep(self, self.layers)
        return row, PixelStep(row)


class Kernels(nn.Module):
    """K_is (1x1) and K_ss of an LSTM, which yield its gates i, f, o and the new content g.

    Args:
        inputs: channels that K_is reads.
        taps: pixels of the line before that K_ss reads.
        features: h.
    """

    def __init__(self, inputs: int, taps: int, features: int) -> None:
        super().__init__()
        self.input_to_state = nn.Linear(inputs, 4 * features)
        self.state_to_state = nn.Linear(taps * features, 4 * features, bias=False)
        # A forget gate that is open lets gradients through many lines.
        nn.init.zeros_(self.input_to_state.bias)
        nn.init.ones_(self.input_to_state.bias[features : 2 * features])

    def of_image(self, x: Tensor) -> Tensor:
        """Return K_is * x, (N, inputs, 1, W) to (N, 4h, 1, W)."""
        return mapped(self.input_to_state.weight, x, self.input_to_state.bias)

    def tap(self, number: int) -> Tensor:
        """Return K_ss of one tap, (4h, h)."""
        features = self.state_to_state.out_features // 4
        return self.state_to_state.weight[:, number * features : (number + 1) * features]


class RowLayer(nn.Module):
    """x + up(h), h an LSTM over rows: gates = K_is * x (1x3, mask B) + K_ss * h above (3 wide).

    Args:
        features: h; the layer maps 2h features to 2h.
        channels: of the image, which this layer does not read.

    Attributes:
        above: channels of K_ss * h and of c of the row above a pixel.
        left: channels of x of the pixel to the left.
    """

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.features = features
        self.above, self.left = 5 * features, 2 * features
        self.lstm = Kernels(2 * 2 * features, 3, features)
        self.up = nn.Linear(features, 2 * features)

    def forward(self, x: Tensor, pixels: Tensor) -> Tensor:
        """Map (2h, H, W, N) likewise."""
        # Mask B leaves two of three taps: the pixel to the left and the present one.
        gates = pointwise(self.lstm.input_to_state, torch.cat([slide(x, 1, x.shape[2]), x]))
        kernel = self.lstm.state_to_state.weight.unsqueeze(0)
        hidden = recurrence(gates.movedim(1, 0).unsqueeze(1), kernel, (1, 0, -1))
        return x + pointwise(self.up, hidden.squeeze(1).movedim(0, 1))

    def row(self, x: Tensor, above: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map a row (N, 2h, 1, W); return also h and c: see `stepwise_stack`."""
        return self._step(x, above, F.pad(x, (1, -1)))

    def below(self, seen: Tensor) -> Tensor:
        """Return K_ss * h of the row above, and its c."""
        h, c = seen.chunk(2, dim=1)
        shifted = (F.pad(h, (shift, -shift)) for shift in (1, 0, -1))
        terms = [mapped(self.lstm.tap(i), h) for i, h in enumerate(shifted)]
        return torch.cat([terms[0] + terms[1] + terms[2], c], dim=1)

    def pixel(self, x: Tensor, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Map a pixel (N, 2h, 1, 1); return also what the next one reads of it."""
        return self._step(x, above, left)[0], x

    def _step(self, x: Tensor, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        term, c = above.split([4 * self.features, self.features], dim=1)
        h, c = gated(self.lstm.of_image(torch.cat([left, x], dim=1)) + term, c)
        return x + mapped(self.up.weight, h, self.up.bias), torch.cat([h, c], dim=1)


class DiagonalLayer(nn.Module):
    """x + up(left + right one row down), two LSTMs over the diagonals: of x, and of x mirrored.

    Gates = K_is * x (1x1) + K_ss * h (2x1: on the diagonal before, the pixels above and left).

    The mirrored LSTM also reads the present pixel, which its output never meets: it goes one row
    down. Without it the last pixel of a row, in no feature of that row because of mask A, would
    be unseen from most of the next one.

    Args:
        features: h; the layer maps 2h features to 2h.
        channels: of the image.

    Attributes:
        above: channels of K_ss * h rightward, and of h leftward, of the pixel above.
        left: channels of h and c rightward of the pixel to the left.
    """

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.features = features
        self.above, self.left = 5 * features, 2 * features
        self.rightward = Kernels(2 * features, 2, features)
        self.leftward = Kernels(2 * features + channels, 2, features)
        self.up = nn.Linear(features, 2 * features)

    def forward(self, x: Tensor, pixels: Tensor) -> Tensor:
        """Map x (2h, H, W, N) likewise, given the pixels (C, H, W, N)."""
        lstms, maps = (self.rightward, self.leftward), (x, torch.cat([x, pixels]).flip(2))
        gates = [
            pointwise(lstm.input_to_state, map_) for lstm, map_ in zip(lstms, maps, strict=True)
        ]
        kernel = torch.stack([lstm.state_to_state.weight for lstm in lstms])
        right, left = over_diagonals(torch.stack(gates), kernel)
        return x + pointwise(self.up, right + F.pad(left.flip(2), (0, 0, 0, 0, 1, -1)))

    def row(self, x: Tensor, above: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map a row (N, 2h, 1, W); return also h of both directions: see `stepwise_stack`.

        In a row the LSTMs walk from pixel to pixel: a line is one pixel wide.
        """
        term, before = self._of(above)
        right = self.rightward.of_image(x) + term
        left = self.leftward.of_image(torch.cat([x, pixels], dim=1))
        left = (left + mapped(self.leftward.tap(0), before)).flip(3)
        lines = torch.stack([right, left]).permute(4, 0, 2, 3, 1)
        kernel = torch.stack([lstm.tap(1) for lstm in (self.rightward, self.leftward)])
        h_right, h_left = recurrence(lines, kernel, (0,)).permute(1, 4, 2, 3, 0)
        seen = torch.cat([h_right, h_left.flip(3)], dim=1)
        return x + mapped(self.up.weight, h_right + before, self.up.bias), seen

    def below(self, seen: Tensor) -> Tensor:
        """Return K_ss * h rightward of the pixel above, and h leftward."""
        right, left = seen.chunk(2, dim=1)
        return torch.cat([mapped(self.rightward.tap(0), right), left], dim=1)

    def pixel(self, x: Tensor, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Map a pixel (N, 2h, 1, 1); return also what the next one reads of it."""
        (term, before), (h, c) = self._of(above), left.chunk(2, dim=1)
        term = term + mapped(self.rightward.tap(1), h)
        h, c = gated(self.rightward.of_image(x) + term, c)
        return x + mapped(self.up.weight, h + before, self.up.bias), torch.cat([h, c], dim=1)

    def _of(self, above: Tensor) -> tuple[Tensor, ...]:
        return above.split([4 * self.features, self.features], dim=1)


def over_diagonals(gates: Tensor, kernel: Tensor) -> Tensor:
    """Run the LSTM from the top left corner to the bottom right one, in H + W - 1 steps.

    A diagonal is a line of pixels from top to bottom. In the exported graph all lines have H of
    them, most of them partly outside the image; the loop leaves that half of the work undone.

    Args:
        gates: (D, 4h, H, W, N).
        kernel: (D, 4h, 2h).

    Returns:
        h: (D, h, H, W, N).
    """
    height, width = gates.shape[2:4]
    shifts = (1, 0)
    if torch.compiler.is_exporting():
        hidden = recurrence(skew(gates).movedim(3, 0), kernel, shifts)
        return unskew(hidden.movedim(0, 3))
    steps = range(height + width - 1)
    tops = [max(0, step - width + 1) for step in steps]
    sizes = [min(height, step + 1) - top for step, top in zip(steps, tops, strict=True)]
    rows, columns = (torch.arange(side, device=gates.device) for side in (height, width))
    order = (rows.unsqueeze(1) + columns).flatten().argsort(stable=True)
    lines = gates.flatten(2, 3).index_select(2, order).split(sizes, dim=2)
    hidden = torch.cat(loop(lines, kernel, shifts, tops), dim=2)
    return hidden.index_select(2, order.argsort()).unflatten(2, (height, width))


def skew(x: Tensor) -> Tensor:
    """Shift row r of (..., H, W, N) by r columns: diagonals become columns, (..., H, H+W-1, N)."""
    height, width = x.shape[-3:-1]
    flat = F.pad(x, (0, 0, 0, height)).flatten(-3, -2)
    return flat[..., : height * (height + width - 1), :].unflatten(-2, (height, -1))


def unskew(x: Tensor) -> Tensor:
    """Undo `skew`: (..., H, H+W-1, N) to (..., H, W, N)."""
    height, columns = x.shape[-3:-1]
    flat = F.pad(x.flatten(-3, -2), (0, 0, 0, height))
    return flat.unflatten(-2, (height, columns + 1))[..., : columns + 1 - height, :]


def recurrence(lines: Tensor, kernel: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """Run the LSTM over T lines of P pixels in D directions; in the exported graph, a Scan.

    Args:
        lines: what the image says to the gates of each line, (T, D, 4h, P, N).
        kernel: K_ss, (D, 4h, taps * h).
        shifts: of each tap: a pixel sees the one `shift` before it in the line before.

    Returns:
        h: (T, D, h, P, N).
    """
    if not torch.compiler.is_exporting():
        return torch.stack(loop(lines.unbind(), kernel, shifts, [0] * len(lines)))
    # Detached: the exporter cannot trace a scan's gradient, and a graph has none.
    lines, kernel = lines.detach(), kernel.detach()
    zero = silence(lines[0], kernel)

    def step(state: tuple[Tensor, Tensor], line: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, c = cell(*state, line, kernel, shifts)
        return (h, c), h.clone()

    return scan(step, (zero, zero.clone()), lines)[1]


def loop(
    lines: Sequence[Tensor], kernel: Tensor, shifts: tuple[int, ...], starts: Sequence[int]
) -> list[Tensor]:
    """Run the LSTM over lines (D, 4h, P, N) of any P, line t from pixel `starts[t]` on."""
    h = c = silence(lines[0], kernel)
    hidden, before = [], starts[0]
    for line, start in zip(lines, starts, strict=True):
        h, c = cell(h, c, line, kernel, shifts, start - before)
        hidden.append(h)
        before = start
    return hidden


def cell(
    h: Tensor, c: Tensor, line: Tensor, kernel: Tensor, shifts: tuple[int, ...], ahead: int = 0
) -> tuple[Tensor, Tensor]:
    """Return h' = o tanh(c') and c' = f c + i g, where i, f, o, g come from line + K_ss * h.

    A zero state stays zero where the line is: the corners that `skew` adds say nothing.

    Args:
        h: the hidden state of the line before, (D, h, P', N).
        c: its cell state, likewise.
        line: (D, 4h, P, N).
        kernel: K_ss, (D, 4h, taps * h).
        shifts: one for each tap.
        ahead: pixels by which the line starts after the one before.
    """
    pixels = line.shape[2]
    taps = torch.cat([slide(h, shift - ahead, pixels) for shift in shifts], dim=1)
    gates = torch.baddbmm(line.flatten(2), kernel, taps.flatten(2)).unflatten(2, line.shape[2:])
    return gated(gates, slide(c, -ahead, pixels))


def gated(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return h' and c' given the gates i, f, o, g, each as many channels as c."""
    i, f, o, g = gates.chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def silence(line: Tensor, kernel: Tensor) -> Tensor:
    """Return the state before the first line, in the kernel's precision: autocast lowers gates."""
    return kernel.new_zeros(line.shape[0], line.shape[1] // 4, *line.shape[2:])


def slide(x: Tensor, by: int, pixels: int) -> Tensor:
    """Move (..., P, N) `by` pixels on, cut and fill up with zeros to (..., pixels, N)."""
    after = pixels - x.shape[-2] - by
    return F.pad(x, (0, 0, by, after)) if by or after else x


def pointwise(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to (inputs, H, W, N)."""
    flat = torch.addmm(linear.bias.unsqueeze(1), linear.weight, x.flatten(1))
    return flat.unflatten(1, x.shape[1:])


def mapped(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a 1x1 convolution, weight (outputs, inputs), to (N, inputs, H, W)."""
    return F.conv2d(x, weight[:, :, None, None], bias)


class RowLSTM(PixelRNN):
    """PixelRNN whose layers walk down the rows; a pixel sees a triangle above it.

    References:
        Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016).
    """

    layer = RowLayer


class DiagonalBiLSTM(PixelRNN):
    """PixelRNN whose layers walk along the diagonals, both ways; a pixel sees all before it.

    References:
        Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016).
    """

    layer = DiagonalLayer
