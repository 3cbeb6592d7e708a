"""Averaged weights as safetensors bytes, for `train --init` and `export`; serving reads none.

What half precision holds exactly takes two bytes a number; it is float32 again when it is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as pack

from anomalyd.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from anomalyd.density.base import Model

__all__ = ["load_weights", "pack_weights", "round_trained", "start_from", "unpack_weights"]


@torch.no_grad()
def round_trained(model: Model) -> None:
    """Round what `model` trains to half precision, by 2^-11 of a weight, or 2^-25, at most.

    What is frozen keeps its weights, and so does a tensor that is beyond the range, 65,504.
    """
    for parameter in model.parameters():
        half = parameter.half()
        if parameter.requires_grad and half.isfinite().all():
            parameter.copy_(half)


def pack_weights(model: Model) -> bytes:
    """Return every parameter and buffer by name, in half precision where that loses nothing."""
    return pack({name: _packed(value) for name, value in model.state_dict().items()})


def _packed(value: Tensor) -> Tensor:
    if value.dtype == torch.float32 and torch.equal(value.half().float(), value):
        value = value.half()
    return value.contiguous()


def unpack_weights(data: bytes, where: str) -> dict[str, Tensor]:
    """Return the tensors in `pack_weights`'s bytes, by name; in float32 those that hold fractions.

    Raises:
        TrainingError: they are damaged.
    """
    try:
        found = parse(data)
    except SafetensorError as error:
        raise TrainingError(
            f"the weights of {where} are damaged ({error}); copy the bundle again"
        ) from error
    return {name: t.float() if t.dtype == torch.half else t for name, t in found.items()}


def load_weights(model: Model, data: bytes, where: str) -> None:
    """Set every parameter and buffer of `model` from `pack_weights`'s bytes.

    Raises:
        TrainingError: the weights are damaged or belong to a model of another shape.
    """
    try:
        model.load_state_dict(unpack_weights(data, where))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"the weights of {where} do not fit this model ({reason}); "
            "use the bundle's own recipe.toml"
        ) from error


def start_from(model: Model, weights: dict[str, Tensor], prefix: str = "") -> list[str]:
    """Copy the tensors that `model` has under the same name in the same shape.

    A density and the same one with companions, or a VAE that is one, differ by a prefix alone.
    Where `model` has parts under `prefix`, they come first.

    Returns:
        the names in `model` of what was taken, such as `encoder.convs.0.weight`.

    Raises:
        TrainingError: no kernel fits.
    """
    own, taken = model.state_dict(), {}
    if prefix and any(prefix in name for name in own):
        weights = {prefix + name: value for name, value in weights.items()}
    for name, value in weights.items():
        bare = name.removeprefix("vae.")
        for alias in (name, f"main.{name}", name.removeprefix("main."), bare, f"main.{bare}"):
            if alias not in taken and alias in own and own[alias].shape == value.shape:
                taken[alias] = value
                break
    # A vector or a bank of noise fits many a model, and is no start.
    if not any(taken[name].ndim >= 2 for name, _ in model.named_parameters() if name in taken):
        raise TrainingError(
            "--init: no kernel of that bundle fits the model of the recipe; start from a "
            "model with the same encoder"
        )
    model.load_state_dict(taken, strict=False)
    return list(taken)
