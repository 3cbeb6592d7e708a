"""The baseline of the scoring benchmark is the same density, only written the usual way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from anomalyd.density.base import ImageShape
from anomalyd.density.gated_pixelcnn import GatedPixelCNN

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from masked import MaskedConv, from_gated


def perturbed(shape: ImageShape, classes: int = 0, **options) -> GatedPixelCNN:
    torch.manual_seed(0)
    density = GatedPixelCNN(shape, classes, features=6, dilations=(1, 2), **options)
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return density


@pytest.mark.parametrize(
    ("shape", "classes", "kernel"),
    [
        (ImageShape(7, 6, 1), 0, 3),
        (ImageShape(7, 6, 3), 0, 3),
        (ImageShape(9, 8, 1), 3, 5),
    ],
)
def test_masked_form_gives_the_same_numbers(shape, classes, kernel):
    """With the cropped kernels inside the masked ones, every pixel's log-likelihood is equal."""
    density = perturbed(shape, classes, pixel="categorical", kernel=kernel)
    x = torch.randint(0, 256, (4, *shape[:3]), dtype=torch.uint8)

    with torch.no_grad():
        ours, usual = density(x), from_gated(density)(x)

    torch.testing.assert_close(usual.nll_map, ours.nll_map, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(usual.log_likelihood, ours.log_likelihood, rtol=1e-5, atol=1e-3)


def test_masked_form_multiplies_by_zeros():
    """The baseline is the wasteful form: its kernels are whole, and about half of each is zero."""
    masked = from_gated(perturbed(ImageShape(7, 6, 1), pixel="categorical"))
    kernels = [m.weight * m.mask for m in masked.modules() if isinstance(m, MaskedConv)]
    shapes = {tuple(kernel.shape[2:]) for kernel in kernels}

    assert shapes == {(5, 5), (1, 5), (3, 3), (1, 3)}
    assert all(0.3 <= (kernel == 0).float().mean() <= 0.8 for kernel in kernels)


def test_masked_form_of_another_pixel_has_weights_of_its_own():
    """Only a categorical pixel has weights to hand over; the layers' sizes are kept regardless."""
    density = perturbed(ImageShape(7, 6, 1), pixel="hierarchical")
    masked = from_gated(density)

    assert [layer.vertical.out_channels for layer in masked.layers] == [12, 12]
    assert [layer.vertical.dilation for layer in masked.layers] == [(1, 1), (2, 2)]
