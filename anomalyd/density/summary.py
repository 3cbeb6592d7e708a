"""From a map of pixels to single numbers that say how strange the image is, and in which way.

total           the whole: -log p(x)
largest_patch   the strangest small window, which the whole drowns
excess          more, or less, surprise than the density itself expected along this image
deviation       surprise out of proportion to what was expected pixel by pixel
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from anomalyd.density.base import Surprise

__all__ = ["deviation", "excess", "excess_map", "largest_patch", "total"]

FLOOR = 0.1
"""Nats squared added to a pixel's variance: where a density is certain, a little surprise is no
great one."""


def total(nll_map: Tensor) -> Tensor:
    """Sum (..., H, W) over its pixels in float64, which float32 would round at 1e-4 nats."""
    return nll_map.double().sum(dim=(-2, -1)).float()


def largest_patch(nll_map: Tensor, side: int = 4) -> Tensor:
    """Return the largest mean of `nll_map` over a side x side window, (N,) nats a pixel."""
    side = min(side, nll_map.shape[1], nll_map.shape[2])
    return F.avg_pool2d(nll_map.unsqueeze(1), side, stride=1).amax(dim=(1, 2, 3))


def excess(surprise: Surprise) -> Tensor:
    """Return sum(nll - mean) / sqrt(1 + sum(variance)), (N,) standard deviations.

    Under the density the numerator sums the steps of a martingale and has mean zero, however
    complex the image; the denominator is drawn with it, so that mean and variance of the quotient
    are near zero and one and no more.

    References:
        Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (Nalisnick
        et al., 2019), whose entropy here is that along the image and not the data's average.
    """
    return total(surprise.nll - surprise.mean) / torch.sqrt(1 + total(surprise.variance))


def excess_map(surprise: Surprise) -> Tensor:
    """Return (nll - mean) / sqrt(variance + 0.1) of each pixel, (N, H, W): where, not how likely.

    Rough but usual texture has a large nll and an excess around zero.
    """
    return (surprise.nll - surprise.mean) * torch.rsqrt(surprise.variance + FLOOR)


def deviation(excess_map: Tensor) -> Tensor:
    """Return the log of the mean square of `excess_map`, (N,)."""
    return torch.log(excess_map.square().mean(dim=(1, 2)) + 1e-6)
