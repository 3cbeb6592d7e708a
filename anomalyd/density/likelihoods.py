"""Distributions of one pixel given its context: categorical, and a mixture of logistics."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.base import ImageShape

__all__ = ["Categorical", "LogisticMixture", "likelihood"]


class Categorical(nn.Module):
    """A softmax over the levels of each channel, red first, then green, then blue.

    p(x | h) = prod_c softmax(W_c elu(h + V_c x_<c))[x_c]: a channel sees those before it through
    an additive term, so the product over channels is exact.

    References:
        Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016).

    Args:
        shape: the image shape.
        features: channels of the context h.
    """

    def __init__(self, shape: ImageShape, features: int) -> None:
        super().__init__()
        self.shape = shape
        self.logits = nn.ModuleList(
            nn.Conv2d(features, shape.levels, 1) for _ in range(shape.channels)
        )
        self.before = nn.ModuleList(
            nn.Conv2d(channel, features, 1, bias=False) for channel in range(1, shape.channels)
        )

    def forward(self, context: Tensor, values: Tensor, inputs: Tensor) -> Tensor:
        """Return log p of each pixel in nats, (N, H, W).

        Args:
            context: (N, F, H, W), computed from pixels before this one.
            values: int64 (N, H, W, C) levels.
            inputs: (N, C, H, W), the same values in [-1, 1].
        """
        total = torch.zeros((), device=context.device)
        for channel, head in enumerate(self.logits):
            seen = context
            if channel:
                seen = seen + self.before[channel - 1](inputs[:, :channel])
            logits = head(F.elu(seen)).permute(0, 2, 3, 1)
            chosen = logits.gather(3, values[..., channel : channel + 1])[..., 0]
            total = total + chosen.float() - torch.logsumexp(logits.float(), dim=3)
        return total


class LogisticMixture(nn.Module):
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
        self.couplings = shape.channels * (shape.channels - 1) // 2
        per_component = 1 + 2 * shape.channels + self.couplings
        self.parameters_of = nn.Conv2d(features, components * per_component, 1)

    def forward(self, context: Tensor, values: Tensor, inputs: Tensor) -> Tensor:
        """Return log p of each pixel in nats, (N, H, W); arguments as in `Categorical`."""
        channels = self.shape.channels
        raw = self.parameters_of(F.elu(context)).float()
        split = [1, channels, channels, self.couplings]
        parts = torch.split(raw, [self.components * part for part in split], dim=1)
        log_pi = F.log_softmax(parts[0], dim=1)
        means, log_scales = parts[1].chunk(channels, 1), parts[2].chunk(channels, 1)
        couplings = parts[3].chunk(self.couplings, 1) if self.couplings else ()
        log_p, row = log_pi, 0
        for channel in range(channels):
            mean = means[channel]
            for earlier in range(channel):
                mean = mean + torch.tanh(couplings[row]) * inputs[:, earlier : earlier + 1]
                row += 1
            level = values[..., channel].unsqueeze(1)
            log_p = log_p + self._level(
                inputs[:, channel : channel + 1], level, mean, log_scales[channel]
            )
        return torch.logsumexp(log_p, dim=1)

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


def likelihood(name: str, shape: ImageShape, features: int, components: int) -> nn.Module:
    """Return the pixel distribution called `name`: `categorical` or `logistic-mixture`."""
    if name == "categorical":
        return Categorical(shape, features)
    if name == "logistic-mixture":
        return LogisticMixture(shape, features, components)
    raise ValueError(f"the pixel likelihood is categorical or logistic-mixture, not {name!r}")
