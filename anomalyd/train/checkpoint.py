"""Checkpoints: one safetensors file, written atomically, from which a run continues exactly."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from anomalyd.errors import TrainingError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

__all__ = ["load", "save"]


def save(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    progress: dict[str, Any],
) -> None:
    """Write weights, optimiser state, random state and progress, then rename into place.

    Args:
        path: the checkpoint; a kill at any moment leaves the old or the new one whole.
        modules: what to store by prefix.
        optimizers: in a fixed order.
        progress: JSON values: step, budget, best so far.
    """
    tensors = {"random": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        for number, random in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.{number}"] = random
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = tensor
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
    # Contiguous clones: safetensors refuses tensors that share memory or are strided.
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    partial = path.with_suffix(".part")
    save_file(owned, partial, metadata={"progress": json.dumps(progress)})
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(path)


def load(
    path: Path, modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore what `save` stored into the same modules and optimisers; return the progress.

    Raises:
        TrainingError: the file is damaged or belongs to another model.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            progress: dict[str, Any] = json.loads(stored.metadata()["progress"])
        for prefix, module in modules.items():
            module.load_state_dict(_under(tensors, f"{prefix}."))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"checkpoint {path} does not fit this run ({reason}); remove its folder to start again"
        ) from error
    for number, optimizer in enumerate(optimizers):
        packed = optimizer.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under(tensors, f"optimizer.{number}.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})
    torch.set_rng_state(tensors["random"])
    # A run may go on with fewer GPUs, or with none.
    for number in range(torch.cuda.device_count()):
        if f"random.{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.{number}"], number)
    return progress


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
