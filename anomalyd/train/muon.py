"""Muon: momentum whose update is orthogonalised, for matrices and convolution kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Muon"]


class Muon(torch.optim.Optimizer):
    """Step along U V^T, where U S V^T is the singular value decomposition of the momentum.

    `torch.optim.Muon` takes matrices only; a kernel (O, I, h, w) is one here, O x Ihw. The
    decomposition is approximated by five Newton-Schulz steps, and the step is scaled by
    0.2 sqrt(max(O, Ihw)), the size that Adam's steps have.

    References:
        Muon: An optimizer for hidden layers in neural networks (Jordan et al., 2024);
        Muon is Scalable for LLM Training (Liu et al., 2025).

    Args:
        params: parameters with at least two dimensions.
        lr: learning rate.
        momentum: decay of the Nesterov momentum.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            decay = group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - decay)
                update = parameter.grad.lerp(state["momentum"], decay).flatten(1)
                size = 0.2 * max(update.shape) ** 0.5
                direction = orthogonalised(update).reshape(parameter.shape)
                parameter.add_(direction, alpha=-group["lr"] * size)


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a matrix (O, I) towards one, into about 0.7 to 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    # A quintic whose slope at zero is steep: small singular values grow fast.
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
