"""PixelCNN++: exact at every size although it halves and doubles the resolution."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from anomalyd.density.base import ImageShape
from anomalyd.density.pixelcnnpp import PixelCNNPP
from anomalyd.detect.runtime import Session
from anomalyd.train.export import check_parity, to_onnx

SIDES = [(8, 6), (9, 7), (4, 4), (1, 6), (7, 1), (2, 3)]


def pixelcnnpp(shape: ImageShape, classes: int = 0, **options) -> PixelCNNPP:
    """A small one whose weights are noise, so that nothing it says is nearly uniform."""
    torch.manual_seed(0)
    options = {"features": (4, 6, 8), "blocks": (1, 1, 1), "components": 3} | options
    density = PixelCNNPP(shape, classes, **options)
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return density.eval()


def every_image(shape: ImageShape) -> Tensor:
    """All images of a shape, (levels ** dims, H, W, C)."""
    levels = [256 * level // shape.levels for level in range(shape.levels)]
    every = torch.tensor(list(itertools.product(levels, repeat=shape.dims)), dtype=torch.uint8)
    return every.reshape(-1, *shape[:3])


def images(shape: ImageShape, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, *shape[:3]), dtype=torch.uint8, generator=generator)


def total_probability(density: PixelCNNPP) -> Tensor:
    """Sum exp(log_prob) over every image there is: () or (K,); it must not be the uniform one."""
    with torch.no_grad():
        parts = [density.log_prob(part) for part in every_image(density.shape).split(16384)]
    log_p = torch.cat(parts).double()
    assert (log_p.std(dim=0) > 0.2).all()
    return log_p.exp().sum(dim=0)


@pytest.mark.parametrize("classes", [0, 2])
def test_density_sums_to_one_over_all_binary_images(classes):
    """Over all 65,536 binary 4x4 images exp(log_prob) adds up to one, for each class."""
    shape, pixel = ImageShape(4, 4, 1, levels=2), "bernoulli" if classes else "logistic-mixture"
    density = pixelcnnpp(
        shape, classes, features=(2, 3, 3), blocks=(0, 1, 0), pixel=pixel, components=2
    )
    total = total_probability(density)

    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "pixel"),
    [
        (ImageShape(3, 3, 1, levels=2), "bernoulli"),
        (ImageShape(1, 2, 3, levels=4), "logistic-mixture"),
        (ImageShape(2, 1, 3, levels=4), "categorical"),
        (ImageShape(1, 1, 1), "logistic-mixture"),
    ],
)
def test_density_sums_to_one_whatever_the_pixel(shape, pixel):
    """Odd sides, colours and all 256 levels: exp(log_prob) over every image adds up to one."""
    assert total_probability(pixelcnnpp(shape, pixel=pixel)).item() == pytest.approx(1, abs=1e-5)


def influence(density: PixelCNNPP) -> Tensor:
    """How far a change of pixel t moves the context of pixel s: (t, s), in float64."""
    height, width = density.shape[:2]
    changes = torch.cat([torch.zeros(1, height * width), torch.eye(height * width)]).double()
    pixels = torch.randn(height, width, dtype=torch.float64)
    with torch.no_grad():
        context = density.double().context(changes.reshape(-1, 1, height, width) + pixels)
    return (context[1:] - context[:1]).abs().amax(dim=(1, 2)).flatten(1)


@pytest.mark.parametrize(("height", "width"), SIDES)
def test_pixel_sees_all_that_comes_before_and_nothing_else(height, width):
    """The context of pixel s moves with the pixel t if, and only if, t comes before s."""
    moved = influence(pixelcnnpp(ImageShape(height, width)))

    before = torch.ones_like(moved, dtype=torch.bool).triu(1)
    assert moved[before].min() > 1e-9
    # The place in the batch decides how sums round.
    assert moved[~before].max() < 1e-13


def test_low_resolutions_see_further_than_the_full_one():
    """At even rows a pixel nine columns to the left is seen, at odd ones six are the limit."""
    moved = influence(pixelcnnpp(ImageShape(4, 12))).reshape(4, 12, 4, 12)

    assert moved[2, 2, 2, 11] > 1e-9
    assert moved[1, 5, 1, 11] > 1e-9
    assert moved[1, 4, 1, 11] < 1e-13


def test_stream_of_rows_above_is_computed_once_for_all_classes():
    """Four classes cost four passes of ul, and one of u."""
    density = pixelcnnpp(ImageShape(6, 5), 4)
    seen = {"u": set(), "ul": set()}
    for name, module in density.named_modules():
        if name.endswith((".u.second", ".ul.second")):
            stream = seen[name.split(".")[-2]]
            module.register_forward_hook(lambda _, x, __, stream=stream: stream.add(len(x[0])))
    density(images(density.shape))

    assert seen == {"u": {3}, "ul": {3, 12}}


def test_all_classes_at_once_are_each_class_alone():
    """Column k of log_prob is what training under the label k alone minimises; columns differ."""
    density = pixelcnnpp(ImageShape(6, 5, 3), 3)
    x = images(density.shape)
    with torch.no_grad():
        together = density.bits_per_dim(density.log_prob(x))
        alone = [density.losses(x, torch.full((3,), label)) for label in range(3)]

    torch.testing.assert_close(together, torch.stack(alone, dim=1))
    assert (together.std(dim=1) > 1e-3).all()


@pytest.mark.parametrize(("pixel", "classes"), [("logistic-mixture", 2), ("hierarchical", 0)])
def test_table_for_sampling_agrees_with_the_score(pixel, classes):
    """log p of the levels that are there, taken from the table of all levels, is the map."""
    density = pixelcnnpp(ImageShape(5, 4, 3, levels=16), classes, pixel=pixel)
    x, labels = images(density.shape), torch.tensor([0, 1, 1]) if classes else None
    with torch.no_grad():
        table = density.log_probs(x, labels)
        taken = table.gather(4, density.quantise(x).unsqueeze(4))[..., 0].sum(dim=3)
        maps = density.nll_maps(x, None if labels is None else labels.unsqueeze(1))[:, 0]

    torch.testing.assert_close(-taken, maps, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(table.exp().sum(dim=4), torch.ones(3, 5, 4, 3))


def test_dropout_is_for_training_alone():
    """Two training passes differ; evaluation is that of the density without dropout."""
    shape = ImageShape(6, 5)
    with_dropout, without = pixelcnnpp(shape, dropout=0.5), pixelcnnpp(shape)
    x = images(shape)

    assert torch.equal(with_dropout.log_prob(x), without.log_prob(x))
    assert not torch.equal(with_dropout.train().log_prob(x), with_dropout.log_prob(x))


def test_exported_graph_is_the_density_and_causal():
    """onnxruntime gives torch's numbers under each class; a pixel moves nothing before it."""
    density = pixelcnnpp(ImageShape(6, 7), 2, features=(4, 6), blocks=(0, 1))
    x = images(density.shape, 5).numpy()
    graph = to_onnx(density)
    check_parity(density, graph, x)
    session = Session(graph, device="cpu", threads=1)
    alone = session.run(x[:1], nll_map=True)

    assert alone.log_likelihood.shape == (1, 2)
    for t in range(42):
        changed = x[:1].copy()
        changed[0, t // 7, t % 7] ^= 0x55
        after = session.run(changed, nll_map=True)
        # The map is that of the likeliest class, which here is always the first.
        assert after.log_likelihood.argmax() == 0
        moved = after.nll_map.ravel() != alone.nll_map.ravel()
        assert moved[t]
        assert not moved[:t].any(), t


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": (8, 8), "blocks": (1,)}, "2 and 1"),
        ({"features": (), "blocks": ()}, "each resolution"),
        ({"pixel": "gaussian"}, "one of categorical"),
    ],
)
def test_impossible_options_are_refused_with_a_reason(options, words):
    """What the architecture cannot be is a ValueError that names the rule."""
    with pytest.raises(ValueError, match=words):
        pixelcnnpp(ImageShape(6, 5), **options)
