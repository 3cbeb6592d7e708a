"""Random shifts and reflections, for what learns to tell classes apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["jittered"]


def jittered(images: Tensor, shift: int, *, mirror: bool) -> Tensor:
    """Move each image by up to `shift` pixels, its edge repeated, and mirror half of them.

    Args:
        images: uint8 (N, H, W, C).
        shift: pixels, either way; 0 moves none.
        mirror: whether each is mirrored, left to right, with probability 1/2.
    """
    if not shift and not mirror:
        return images
    n, height, width, _ = images.shape
    device = images.device
    by = torch.randint(-shift, shift + 1, (2, n, 1), device=device)
    rows = (torch.arange(height, device=device) + by[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + by[1]).clamp(0, width - 1)
    if mirror:
        turned = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(turned, width - 1 - columns, columns)
    every = torch.arange(n, device=device)[:, None, None]
    return images[every, rows[:, :, None], columns[:, None]]
