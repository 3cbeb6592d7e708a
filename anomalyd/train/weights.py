"""Averaged weights as safetensors bytes, for `train --init` and `export`; serving reads none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as pack

from anomalyd.errors import TrainingError

if TYPE_CHECKING:
    from anomalyd.density.base import Density

__all__ = ["load_weights", "pack_weights"]


def pack_weights(density: Density) -> bytes:
    """Return every parameter and buffer, by name."""
    return pack({name: value.contiguous() for name, value in density.state_dict().items()})


def load_weights(density: Density, data: bytes, where: str) -> None:
    """Set every parameter and buffer of `density` from `pack_weights`'s bytes.

    Raises:
        TrainingError: the weights are damaged or belong to a density of another shape.
    """
    try:
        density.load_state_dict(parse(data))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"the weights of {where} do not fit this density ({reason}); "
            "use the bundle's own recipe.toml"
        ) from error
