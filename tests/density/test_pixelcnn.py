"""PixelCNN: masks that are crops, a receptive field with its blind spot, an exact density."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomalyd.density.base import ImageShape
from anomalyd.density.pixelcnn import MaskedConv, PixelCNN
from anomalyd.detect.runtime import Session
from anomalyd.train.export import check_parity, to_onnx


def pixelcnn(shape: ImageShape, **options) -> PixelCNN:
    """A small one whose weights are noise, so that nothing it says is nearly uniform."""
    torch.manual_seed(0)
    options = {"features": 8, "blocks": 2, "kernel": 5, "components": 3} | options
    density = PixelCNN(shape, **options)
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return density.eval()


def every_image(shape: ImageShape) -> Tensor:
    """All images of a shape, (levels ** dims, H, W, C)."""
    levels = [256 * level // shape.levels for level in range(shape.levels)]
    every = torch.tensor(list(itertools.product(levels, repeat=shape.dims)), dtype=torch.uint8)
    return every.reshape(-1, *shape[:3])


@pytest.mark.parametrize("mask", ["A", "B"])
@pytest.mark.parametrize("kernel", [3, 7])
def test_cropped_convolution_is_the_masked_one(kernel, mask):
    """A full kernel with zeros from the mask on gives what the cropped one gives."""
    torch.manual_seed(0)
    conv, half = MaskedConv(3, 4, kernel, mask), kernel // 2
    full = torch.zeros(4, 3, kernel, kernel)
    full[:, :, :half] = conv.above.weight
    full[:, :, half, : half + (mask == "B")] = conv.left.weight[:, :, 0]
    x = torch.randn(2, 3, 5, 6)

    torch.testing.assert_close(conv(x), F.conv2d(x, full, conv.above.bias, padding=half))


def test_receptive_field_is_the_one_with_the_blind_spot():
    """Row r above is seen up to kernel//2 + r - 1 columns to the right, and no further."""
    height, width, half, blocks = 6, 12, 2, 2
    density = pixelcnn(ImageShape(height, width), kernel=2 * half + 1, blocks=blocks).double()
    changes = torch.cat([torch.zeros(1, height * width), torch.eye(height * width)]).double()
    pixels = torch.randn(height, width, dtype=torch.float64)
    with torch.no_grad():
        context = density.context(changes.reshape(-1, 1, height, width) + pixels)
    # The place in the batch decides how sums round.
    moved = (context[1:] - context[:1]).abs().amax(dim=(1, 2)) > 1e-12

    for row, column in itertools.product(range(height), range(width)):
        for other, place in itertools.product(range(height), range(width)):
            up, right = row - other, place - column
            if up == 0:
                seen = -(half + blocks) <= right <= -1
            else:
                furthest = half + min(up - 1, blocks)
                seen = 1 <= up <= half + blocks and -(half + blocks) <= right <= furthest
            assert moved[other * width + place, row, column] == seen, (row, column, other, place)


@pytest.mark.parametrize(
    ("shape", "pixel"),
    [
        (ImageShape(3, 3, 1, levels=2), "bernoulli"),
        (ImageShape(3, 3, 1, levels=2), "hierarchical"),
        (ImageShape(1, 2, 3, levels=4), "categorical"),
        (ImageShape(1, 2, 3, levels=4), "hierarchical"),
        (ImageShape(2, 1, 3, levels=4), "logistic-mixture"),
        (ImageShape(1, 1, 1), "hierarchical"),
    ],
)
def test_density_sums_to_one_over_all_images(shape, pixel):
    """exp(log_prob) over every image there is adds up to one, and is far from uniform."""
    density = pixelcnn(shape, pixel=pixel)
    with torch.no_grad():
        log_p = density.log_prob(every_image(shape)).double()

    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_p.std() > 0.3


@pytest.mark.parametrize("pixel", ["categorical", "logistic-mixture"])
def test_table_for_sampling_agrees_with_the_score(pixel):
    """log p of the levels that are there, taken from the table of all levels, is the map."""
    density = pixelcnn(ImageShape(5, 4, 3, levels=16), pixel=pixel)
    x = torch.randint(0, 256, (3, 5, 4, 3), dtype=torch.uint8)
    with torch.no_grad():
        table = density.log_probs(x)
        taken = table.gather(4, density.quantise(x).unsqueeze(4))[..., 0].sum(dim=3)

        torch.testing.assert_close(-taken, density.nll_maps(x)[:, 0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(table.exp().sum(dim=4), torch.ones(3, 5, 4, 3))


def test_exported_graph_is_the_density_and_causal():
    """onnxruntime gives torch's numbers, and a changed pixel moves nothing before it."""
    density = pixelcnn(ImageShape(6, 7, 3), blocks=1)
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    graph = to_onnx(density)
    check_parity(density, graph, images)
    session = Session(graph, device="cpu", threads=1)

    before = session.run(images[:1], nll_map=True).nll_map.ravel()
    for t in range(42):
        changed = images[:1].copy()
        changed[0, t // 7, t % 7] ^= 0x55
        moved = session.run(changed, nll_map=True).nll_map.ravel() != before
        assert moved[t]
        assert not moved[:t].any(), t


def test_default_is_small():
    """The recipe's defaults stay below 60,000 parameters on 28x28 grey images."""
    assert sum(p.numel() for p in PixelCNN(ImageShape(28, 28)).parameters()) < 60_000


@pytest.mark.parametrize(
    ("options", "words"),
    [({"kernel": 6}, "odd"), ({"kernel": 1}, "at least 3"), ({"features": 7}, "even")],
)
def test_impossible_options_are_refused_with_a_reason(options, words):
    """What the architecture cannot be is a ValueError that names the rule."""
    with pytest.raises(ValueError, match=words):
        pixelcnn(ImageShape(6, 5), **options)
