"""Where eight bits of a mantissa are not enough."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["precise"]


def precise(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves float32 as it is, on the device of `x`.

    In bfloat16 the mean of a logistic near 1 is a level off, and so is a code of a VAE.
    """
    kind = x.device.type
    return (
        torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    )
