"""Distributions of one pixel given its context, each normalised exactly over its levels.

    categorical        a softmax over all levels
    hierarchical       a softmax over bands of levels, then one inside the band
    logistic-mixture   a mixture of logistics, cut at the levels
    bernoulli          the odds of one of two levels

Each is called with (context, values, inputs) and returns log p of the values that are there; its
`log_probs` returns log p of every level, for sampling. Red comes first, then green, then blue.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import ImageShape, PixelLikelihood, Surprise
from anomalyd.density.layers import levels_of
from anomalyd.density.precision import precise

__all__ = [
    "Bernoulli",
    "Categorical",
    "Hierarchical",
    "LogisticMixture",
    "likelihood",
]


class _Channels(PixelLikelihood):
    """What a channel sees of those before it: h + V_c x_<c, an additive term."""

    def __init__(self, shape: ImageShape, features: int) -> None:
        super().__init__()
        self.shape = shape
        self.before = nn.ModuleList(
            nn.Conv2d(channel, features, 1, bias=False) for channel in range(1, shape.channels)
        )

    def seen(self, context: Tensor, inputs: Tensor, channel: int) -> Tensor:
        """Return the context of one channel, (N, F, H, W)."""
        if not channel:
            return context
        return context + self.before[channel - 1](inputs[:, :channel])

    def forward(self, context: Tensor, values: Tensor, inputs: Tensor) -> Tensor:
        terms = [
            self.channel(self.seen(context, inputs, channel), values[..., channel], channel)
            for channel in range(self.shape.channels)
        ]
        return torch.stack(terms).sum(dim=0) if len(terms) > 1 else terms[0]

    def surprise(self, context: Tensor, values: Tensor, inputs: Tensor) -> Surprise:
        terms = [
            self.channel_surprise(
                self.seen(context, inputs, channel), values[..., channel], channel
            )
            for channel in range(self.shape.channels)
        ]
        # A channel's deviation has mean zero given those before it, so variances add up.
        return Surprise(*(sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)))

    def log_probs(self, context: Tensor, inputs: Tensor) -> Tensor:
        tables = [
            self.table(self.seen(context, inputs, channel), channel)
            for channel in range(self.shape.channels)
        ]
        return torch.stack(tables, dim=1).permute(0, 3, 4, 1, 2)

    def channel(self, seen: Tensor, value: Tensor, channel: int) -> Tensor:
        """Return log p of one channel's values (N, H, W), in nats: (N, H, W)."""
        raise NotImplementedError

    def channel_surprise(self, seen: Tensor, value: Tensor, channel: int) -> Surprise:
        """Return -log p of one channel's values with its mean and variance, each (N, H, W)."""
        raise NotImplementedError

    def table(self, seen: Tensor, channel: int) -> Tensor:
        """Return log p of one channel's levels, in nats: (N, levels, H, W)."""
        raise NotImplementedError


class Categorical(_Channels):
    """p(x | h) = prod_c softmax(W_c elu(h + V_c x_<c))[x_c].

    References:
        Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016).

    Args:
        shape: the image shape.
        features: channels of the context h.
    """

    def __init__(self, shape: ImageShape, features: int) -> None:
        super().__init__(shape, features)
        self.logits = nn.ModuleList(
            nn.Conv2d(features, shape.levels, 1) for _ in range(shape.channels)
        )

    def channel(self, seen: Tensor, value: Tensor, channel: int) -> Tensor:
        logits = self.logits[channel](F.elu(seen)).permute(0, 2, 3, 1)
        chosen = logits.gather(3, value.unsqueeze(3))[..., 0]
        return chosen.float() - torch.logsumexp(logits.float(), dim=3)

    def channel_surprise(self, seen: Tensor, value: Tensor, channel: int) -> Surprise:
        return _surprise(self.logits[channel](F.elu(seen)), value)

    def table(self, seen: Tensor, channel: int) -> Tensor:
        return F.log_softmax(self.logits[channel](F.elu(seen)).float(), dim=1)


class Hierarchical(_Channels):
    """p(x | h) = prod_c softmax(A_c elu(g))[b] softmax(B_c elu(g + E_c b))[x_c mod w].

    g = h + V_c x_<c, b = x_c div w the band of a level, w = sqrt(levels) rounded up: as free as
    `Categorical`, with two short softmaxes in place of one over all levels. Hidden units add
    D elu(U elu(h')) and D' elu(U' elu(h') + E'_c b) to the logits; h' may have further channels,
    which no one else reads.

    References:
        Hierarchical Probabilistic Neural Network Language Model (Morin, Bengio, 2005).

    Args:
        shape: the image shape.
        features: channels of the context h.
        hidden: hidden units of U and U', or 0.
        more: channels that h' has beyond those of h.
    """

    absent: Tensor

    def __init__(
        self, shape: ImageShape, features: int, *, hidden: int = 0, more: int = 0
    ) -> None:
        super().__init__(shape, features + more)
        self.features = features
        self.width, self.bands = _bands(shape.levels)
        channels = range(shape.channels)
        self.band = nn.ModuleList(nn.Conv2d(features, self.bands, 1) for _ in channels)
        self.inside = nn.ModuleList(nn.Conv2d(features, self.width, 1) for _ in channels)
        self.of_band = nn.ModuleList(nn.Embedding(self.bands, features) for _ in channels)
        inputs, deep = features + more, channels if hidden else ()
        self.band_hidden = nn.ModuleList(_Hidden(inputs, hidden, self.bands) for _ in deep)
        self.inside_hidden = nn.ModuleList(_Hidden(inputs, hidden, self.width) for _ in deep)
        self.hidden_of_band = nn.ModuleList(nn.Embedding(self.bands, hidden) for _ in deep)
        # Where the last band is not full, its levels beyond the last have probability zero.
        short = self.bands * self.width - shape.levels
        absent = torch.zeros(self.bands, self.width)
        absent[-1, self.width - short :] = -1e30
        self.register_buffer("absent", absent, persistent=False)

    def channel(self, seen: Tensor, value: Tensor, channel: int) -> Tensor:
        (bands, band), (inside, place) = self._two(seen, value, channel)
        return _chosen(bands, band) + _chosen(inside, place)

    def channel_surprise(self, seen: Tensor, value: Tensor, channel: int) -> Surprise:
        # The level's part is expected given the band: its deviation has mean zero all the same,
        # and one short softmax is enough where the entropy over all levels would take sixteen.
        band, inside = (_surprise(*pair) for pair in self._two(seen, value, channel))
        return Surprise(*(a + b for a, b in zip(band, inside, strict=True)))

    def _two(
        self, seen: Tensor, value: Tensor, channel: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return logits and choice of the band, and of the level within it."""
        band = torch.div(value, self.width, rounding_mode="floor")
        bands = self._band_logits(seen, channel)
        h = seen[:, : self.features]
        given = F.elu(h + self.of_band[channel](band).permute(0, 3, 1, 2))
        logits = self.inside[channel](given)
        if self.inside_hidden:
            hidden = cast("_Hidden", self.inside_hidden[channel])
            of_band = self.hidden_of_band[channel](band).permute(0, 3, 1, 2)
            logits = logits + hidden.logits(hidden.units(seen) + of_band)
        if self.bands * self.width > self.shape.levels:
            logits = logits + self.absent[band].permute(0, 3, 1, 2)
        return (bands, band), (logits, value - band * self.width)

    def _band_logits(self, seen: Tensor, channel: int) -> Tensor:
        """Return the logits of the bands, (N, bands, H, W)."""
        logits = self.band[channel](F.elu(seen[:, : self.features]))
        if self.band_hidden:
            hidden = cast("_Hidden", self.band_hidden[channel])
            logits = logits + hidden.logits(hidden.units(seen))
        return logits

    def table(self, seen: Tensor, channel: int) -> Tensor:
        log_band = F.log_softmax(self._band_logits(seen, channel).float(), dim=1)
        given = F.elu(_each(seen[:, : self.features], self.of_band[channel]))
        logits = self.inside[channel](given)
        if self.inside_hidden:
            hidden = cast("_Hidden", self.inside_hidden[channel])
            units = _each(hidden.units(seen), self.hidden_of_band[channel])
            logits = logits + hidden.logits(units)
        logits = logits.float().unflatten(0, (-1, self.bands))
        logits = logits + self.absent[None, :, :, None, None]
        table = F.log_softmax(logits, dim=2) + log_band.unsqueeze(2)
        return table.flatten(1, 2)[:, : self.shape.levels]


class _Hidden(nn.Module):
    """Logits of a hidden layer, D elu(U elu(h)), zero at first.

    Args:
        inputs: channels of h.
        hidden: units.
        outputs: logits.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(inputs, hidden, 1)
        self.down = nn.Conv2d(hidden, outputs, 1, bias=False)
        nn.init.zeros_(self.down.weight)

    def units(self, h: Tensor) -> Tensor:
        return self.up(F.elu(h))

    def logits(self, units: Tensor) -> Tensor:
        return self.down(F.elu(units))


def _each(h: Tensor, of_band: nn.Module) -> Tensor:
    """Add the vector of each band to (N, F, H, W): (N * bands, F, H, W)."""
    vectors = cast("nn.Embedding", of_band).weight
    return (h.unsqueeze(1) + vectors[None, :, :, None, None]).flatten(0, 1)


def _bands(levels: int) -> tuple[int, int]:
    """Return how many levels a band has, the square root rounded up, and how many bands."""
    width = math.ceil(math.sqrt(levels))
    return width, math.ceil(levels / width)


def _chosen(logits: Tensor, index: Tensor) -> Tensor:
    """Return log softmax(logits)[index] over the channels of (N, L, H, W): (N, H, W)."""
    logits = logits.float()
    return logits.gather(1, index.unsqueeze(1))[:, 0] - torch.logsumexp(logits, dim=1)


def _surprise(logits: Tensor, index: Tensor) -> Surprise:
    """Return the surprise at a choice from softmax(logits) over the channels of (N, L, H, W)."""
    logits = logits.float()
    logits = logits - logits.amax(dim=1, keepdim=True)
    chosen = logits.gather(1, index.unsqueeze(1))[:, 0]
    # Levels that are absent stand at -1e30, whose square is not finite.
    logits = logits.clamp(min=-1e4)
    weights = torch.exp(logits)
    weights = weights / weights.sum(dim=1, keepdim=True)
    log_z = torch.logsumexp(logits, dim=1)
    mean = (weights * logits).sum(dim=1)
    square = (weights * logits * logits).sum(dim=1)
    return Surprise(log_z - chosen, log_z - mean, torch.relu(square - mean * mean))


class Bernoulli(_Channels):
    """p(x = 1 | h) = sigmoid(W elu(h)), for images of two levels and nothing else.

    Args:
        shape: the image shape, of two levels.
        features: channels of the context h.
    """

    def __init__(self, shape: ImageShape, features: int) -> None:
        if shape.levels != 2:
            raise ValueError(f"a Bernoulli pixel needs images of 2 levels, not {shape.levels}")
        super().__init__(shape, features)
        self.odds = nn.ModuleList(nn.Conv2d(features, 1, 1) for _ in range(shape.channels))

    def channel(self, seen: Tensor, value: Tensor, channel: int) -> Tensor:
        odds = self.odds[channel](F.elu(seen)).float()[:, 0]
        return -F.softplus(torch.where(value == 1, -odds, odds))

    def channel_surprise(self, seen: Tensor, value: Tensor, channel: int) -> Surprise:
        return _surprise(self.table(seen, channel), value)

    def table(self, seen: Tensor, channel: int) -> Tensor:
        odds = self.odds[channel](F.elu(seen)).float()
        return torch.cat([-F.softplus(odds), -F.softplus(-odds)], dim=1)


class LogisticMixture(PixelLikelihood):
    """A discretized mixture of logistics; channels are coupled linearly within a component.

    p(x | h) = sum_k pi_k prod_c [sigmoid((x_c + w/2 - m_kc) / s_kc) - sigmoid((x_c - w/2 - m_kc)
    / s_kc)], w the width of a level and the two outermost levels open, so that the levels sum to
    one exactly.

    References:
        PixelCNN++ (Salimans, Karpathy, Chen, Kingma, 2017).

    Args:
        shape: the image shape.
        features: channels of the context h.
        components: logistics in the mixture.
    """

    def __init__(self, shape: ImageShape, features: int, components: int = 10) -> None:
        super().__init__()
        self.shape = shape
        self.components = components
        self.width, self.bands = _bands(shape.levels)
        self.couplings = shape.channels * (shape.channels - 1) // 2
        per_component = 1 + 2 * shape.channels + self.couplings
        self.parameters_of = nn.Conv2d(features, components * per_component, 1)

    def forward(self, context: Tensor, values: Tensor, inputs: Tensor) -> Tensor:
        log_p, means, log_scales = self._components(context, inputs)
        for channel in range(self.shape.channels):
            level = values[..., channel].unsqueeze(1)
            x = inputs[:, channel : channel + 1]
            log_p = log_p + self._level(x, level, means[channel], log_scales[channel])
        return torch.logsumexp(log_p, dim=1)

    def surprise(self, context: Tensor, values: Tensor, inputs: Tensor) -> Surprise:
        # As in `Hierarchical`, the level is expected given the band that came.
        log_p, means, log_scales = self._components(context, inputs)
        parts = []
        for channel, (mean, log_scale) in enumerate(zip(means, log_scales, strict=True)):
            level = values[..., channel].unsqueeze(1)
            band = torch.div(level, self.width, rounding_mode="floor")
            first = band * self.width
            given = (F.log_softmax(log_p, dim=1), mean, log_scale)
            bands = self._runs(*given, torch.zeros_like(first), self.width, self.bands)
            inside = self._runs(*given, first, 1, self.width)
            parts += [_surprise(bands, band[:, 0]), _surprise(inside, (level - first)[:, 0])]
            x = inputs[:, channel : channel + 1]
            log_p = log_p + self._level(x, level, mean, log_scale)
        _, expected, variance = (torch.stack(maps).sum(dim=0) for maps in zip(*parts, strict=True))
        return Surprise(-torch.logsumexp(log_p, dim=1), expected, variance)

    def log_probs(self, context: Tensor, inputs: Tensor) -> Tensor:
        log_p, means, log_scales = self._components(context, inputs)
        level = torch.arange(self.shape.levels, device=context.device).reshape(1, -1, 1, 1)
        grid = level * (2 / (self.shape.levels - 1)) - 1
        tables = []
        for channel in range(self.shape.channels):
            # A component that explains the channels so far weighs more for the next.
            weights = F.log_softmax(log_p, dim=1)
            table = torch.full_like(weights[:, :1], -1e30)
            for k in range(self.components):
                mean, log_scale = means[channel][:, k : k + 1], log_scales[channel][:, k : k + 1]
                component = self._level(grid, level, mean, log_scale)
                table = torch.logaddexp(table, weights[:, k : k + 1] + component)
            # Rounding leaves the sum of 256 levels a few 1e-6 off one.
            tables.append(F.log_softmax(table, dim=1))
            x = inputs[:, channel : channel + 1]
            drawn = levels_of(x, self.shape.levels)
            log_p = log_p + self._level(x, drawn, means[channel], log_scales[channel])
        return torch.stack(tables, dim=1).permute(0, 3, 4, 1, 2)

    def _components(
        self, context: Tensor, inputs: Tensor
    ) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
        """Return log weights (N, K, H, W), and by channel the means and log scales, likewise."""
        channels = self.shape.channels
        with precise(context):
            raw = self.parameters_of(F.elu(context).float())
        split = [1, channels, channels, self.couplings]
        parts = torch.split(raw, [self.components * part for part in split], dim=1)
        log_pi = F.log_softmax(parts[0], dim=1)
        means, log_scales = parts[1].chunk(channels, 1), parts[2].chunk(channels, 1)
        couplings = parts[3].chunk(self.couplings, 1) if self.couplings else ()
        coupled, row = [], 0
        for channel in range(channels):
            mean = means[channel]
            for earlier in range(channel):
                mean = mean + torch.tanh(couplings[row]) * inputs[:, earlier : earlier + 1]
                row += 1
            coupled.append(mean)
        return log_pi, coupled, log_scales

    def _runs(
        self,
        log_weights: Tensor,
        mean: Tensor,
        log_scale: Tensor,
        start: Tensor,
        width: int,
        count: int,
    ) -> Tensor:
        """Return log p of `count` runs of `width` levels each, from level `start` (N, 1, H, W).

        But for a constant: (N, count, H, W). A component is its distribution function at the
        edges between runs, or, above its mean, what is left to one, so that its tail keeps its
        digits; and where all runs lie so deep in a tail that it would underflow there, all are
        brought nearer, where they have the same shares, and the component weighs less instead.
        """
        inverse = torch.exp(-log_scale.clamp(min=-7.0, max=7.0))
        edges = start + width * torch.arange(count + 1, device=start.device).reshape(1, -1, 1, 1)
        x = (edges.float() - 0.5) * (2 / (self.shape.levels - 1)) - 1
        x = torch.where(edges <= 0, -1e6, torch.where(edges >= self.shape.levels, 1e6, x))
        low, middle, high = x[:, :1], x[:, count // 2 : count // 2 + 1], x[:, -1:]
        side = torch.where(middle < mean, 1.0, -1.0)
        nearest = torch.where(middle < mean, high - mean, mean - low) * inverse
        nearer = F.relu(-20.0 - nearest)
        weights = torch.softmax(log_weights - nearer, dim=1) * side
        slope = inverse * side
        offset = nearer - mean * slope
        below = torch.zeros_like(x)
        for k in range(self.components):
            one = slice(k, k + 1)
            below = below + weights[:, one] * torch.sigmoid(x * slope[:, one] + offset[:, one])
        return torch.log((below[:, 1:] - below[:, :-1]).clamp(min=1e-30))

    def _level(self, x: Tensor, level: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        """Return log of a logistic's mass on one level, (N, components, H, W).

        With a, b the standardised upper and lower edge,
        log(sigmoid(a) - sigmoid(b)) = log sigmoid(a) + log sigmoid(-b) + log(1 - exp(b - a)),
        which neither cancels nor overflows.
        """
        log_scale = log_scale.clamp(min=-7.0, max=7.0)
        inverse = torch.exp(-log_scale)
        half = 1 / (self.shape.levels - 1)
        centre = (x - mean) * inverse
        edge = half * inverse
        # Not logsigmoid: the exporter writes it as log(sigmoid(x)), which underflows.
        upper = -F.softplus(-centre - edge)
        lower = -F.softplus(centre - edge)
        first, last = level == 0, level == self.shape.levels - 1
        inner = upper + lower + _log1mexp(2 * edge, math.log(2 * half) - log_scale)
        return torch.where(first, upper, torch.where(last, lower, inner))


def _log1mexp(d: Tensor, log_d: Tensor) -> Tensor:
    """Return log(1 - exp(-d)) for d > 0, by its series where the difference would cancel."""
    square = d * d
    series = log_d - d / 2 + square / 24 - square * square / 2880
    direct = torch.log1p(-torch.exp(-torch.clamp(d, min=0.25)))
    return torch.where(d < 0.5, series, direct)


_SOFTMAXES: dict[str, type[_Channels]] = {
    "categorical": Categorical,
    "hierarchical": Hierarchical,
    "bernoulli": Bernoulli,
}


def likelihood(
    name: str,
    shape: ImageShape,
    features: int,
    components: int,
    *,
    hidden: int = 0,
    more: int = 0,
) -> PixelLikelihood:
    """Return the pixel distribution called `name`, reading `features` channels of context.

    With `hidden` units, for which the context may have `more` channels: see `Hierarchical`.

    Raises:
        ValueError: no such distribution, one that the images have the wrong levels for, or that
            has no hidden units.
    """
    if hidden or more:
        if name != "hierarchical":
            raise ValueError(f"a {name} pixel has no readout of hidden units: readout = 0")
        if not hidden:
            raise ValueError(
                "nearby levels are read by hidden units; without a readout nearby = 0"
            )
        return Hierarchical(shape, features, hidden=hidden, more=more)
    if name == "logistic-mixture":
        return LogisticMixture(shape, features, components)
    if name not in _SOFTMAXES:
        names = ", ".join([*_SOFTMAXES, "logistic-mixture"])
        raise ValueError(f"the pixel likelihood is one of {names}, not {name!r}")
    return _SOFTMAXES[name](shape, features)
