"""The multi-scale density: a base in raster order, and groups of pixels drawn at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalyd.density.base import ImageShape
from anomalyd.density.multiscale import Multiscale
from anomalyd.detect.runtime import Session
from anomalyd.train.export import check_parity, to_onnx

SIZES = [(1, 1), (1, 6), (5, 1), (2, 2), (3, 3), (4, 4), (6, 5), (7, 9)]


def multiscale(shape: ImageShape, **options) -> Multiscale:
    """A small density with weights far from those of a uniform distribution."""
    torch.manual_seed(0)
    tiny = {"features": 6, "layers": 1, "components": 3}
    density = Multiscale(shape, **(tiny | options))
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return density.eval()


def random_images(shape: ImageShape, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, *shape[:3]), dtype=torch.uint8, generator=generator)


def every_image(shape: ImageShape) -> Tensor:
    """All levels^(H W C) images of a shape, by their lowest bytes."""
    lowest = torch.tensor([-(-256 * i // shape.levels) for i in range(shape.levels)])
    digits = torch.cartesian_prod(*[lowest.to(torch.uint8)] * shape.dims)
    return digits.reshape(-1, *shape[:3])


@pytest.mark.parametrize("pixel", ["hierarchical", "logistic-mixture", "bernoulli"])
@pytest.mark.parametrize("side", [3, 4])
def test_density_sums_to_one_over_all_binary_images(side, pixel):
    """exp(log_prob) over all 512 binary 3x3, and all 65,536 binary 4x4, images adds up to one."""
    density = multiscale(ImageShape(side, side, 1, levels=2), pixel=pixel)
    chunks = every_image(density.shape).split(16_384)

    with torch.no_grad():
        log_p = torch.cat([density.log_prob(chunk) for chunk in chunks]).double()

    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_p.std() > 0.1


@pytest.mark.parametrize("pixel", ["categorical", "hierarchical", "logistic-mixture"])
@pytest.mark.parametrize("size", [(1, 2), (2, 1)])
def test_density_sums_to_one_over_all_colours(size, pixel):
    """exp(log_prob) over all 4^6 images of two RGB pixels adds up to one, base and group alike."""
    density = multiscale(ImageShape(*size, 3, levels=4), pixel=pixel)

    with torch.no_grad():
        total = density.log_prob(every_image(density.shape)).double().exp().sum()

    assert total.item() == pytest.approx(1, abs=1e-5)


def test_an_image_takes_far_fewer_steps_than_pixels():
    """784 grey pixels are drawn in 7x7 + 2x3 = 55 steps, 784 RGB ones in three times as many."""
    grey = multiscale(ImageShape(28, 28, 1)).order
    colour = multiscale(ImageShape(28, 28, 3)).order

    assert int(grey.max()) + 1 == 55
    assert int(colour.max()) + 1 == 165
    assert torch.bincount(grey.flatten()).tolist() == [1] * 49 + [49] * 3 + [196] * 3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_order_numbers_every_value_without_gaps(size, channels):
    """At any size each step draws something, and red, green, blue are consecutive."""
    order = multiscale(ImageShape(*size, channels)).order

    assert order.shape == (*size, channels)
    assert order.dtype == torch.int64
    assert sorted(set(order.flatten().tolist())) == list(range(int(order.max()) + 1))
    assert torch.equal(order - order[..., :1], torch.arange(channels).expand(*size, channels))


@pytest.mark.parametrize("size", SIZES)
def test_any_size_has_a_sampling_table_of_what_is_known(size):
    """Changing all that is not drawn before step s leaves the table of that step as it was."""
    density = multiscale(ImageShape(*size, 1), pixel="hierarchical")
    x, other = random_images(density.shape, 2).split(1)
    order = density.order.unsqueeze(0)

    with torch.no_grad():
        table = density.log_probs(x)
        for step in range(int(order.max()) + 1):
            unknown = torch.where(order < step, x, other)
            now = order == step
            assert torch.equal(density.log_probs(unknown)[now], table[now]), step


@pytest.mark.parametrize(("size", "channels"), [((6, 5), 1), ((7, 9), 3)])
@pytest.mark.parametrize("pixel", ["hierarchical", "logistic-mixture"])
def test_sampling_table_agrees_with_the_map(size, channels, pixel):
    """What the table says of the levels that are there, summed over channels, is -nll_map."""
    density = multiscale(ImageShape(*size, channels), pixel=pixel)
    x = random_images(density.shape)

    with torch.no_grad():
        table = density.log_probs(x)
        chosen = table.gather(4, density.quantise(x).unsqueeze(4))[..., 0].sum(dim=3)

        torch.testing.assert_close(chosen, -density(x).nll_map, rtol=1e-4, atol=1e-4)
    assert torch.allclose(table.double().exp().sum(dim=4), torch.ones(()).double(), atol=1e-4)


def test_groups_see_their_neighbours_on_every_side():
    """The last group of a doubling depends on all eight neighbours, raster order regardless."""
    density = multiscale(ImageShape(9, 9, 1))
    x = random_images(density.shape, 1)
    row, column = 5, 4  # row odd, column even: of the last group
    with torch.no_grad():
        before = density(x).nll_map[0, row, column]
        for down, right in itertools.product((-1, 0, 1), repeat=2):
            changed = x.clone()
            changed[0, row + down, column + right] ^= 0x55
            assert density(changed).nll_map[0, row, column] != before, (down, right)


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_learns_at_any_size(size):
    """No layer is made for a group that an image has no pixels of."""
    density = multiscale(ImageShape(*size, 1))
    density.loss(random_images(density.shape)).backward()

    assert [name for name, p in density.named_parameters() if p.grad is None] == []


def test_more_doublings_than_the_image_allows_are_left_out():
    """A base of one pixel is halved no further; none at all would be no multi-scale density."""
    assert len(multiscale(ImageShape(5, 3, 1), doublings=9).doublings) == 3
    with pytest.raises(ValueError, match="doublings must be at least 1, not 0"):
        multiscale(ImageShape(5, 3, 1), doublings=0)


@pytest.fixture(scope="module")
def exported() -> tuple[Multiscale, bytes]:
    """A density of odd sides in colour, and its graph."""
    density = multiscale(ImageShape(5, 7, 3), pixel="hierarchical")
    return density, to_onnx(density)


def test_exported_graph_gives_the_same_numbers(exported):
    """onnxruntime differs from torch by at most the tolerance, whole batches and single images."""
    density, graph = exported

    check_parity(density, graph, random_images(density.shape, 20).numpy())


def test_exported_graph_keeps_the_order(exported):
    """In onnxruntime too, a changed pixel moves none of its own step or before."""
    density, graph = exported
    session = Session(graph, device="cpu", threads=1)
    steps = density.order[..., 0].flatten().numpy()
    x = random_images(density.shape, 1).numpy()
    changed = np.repeat(x, len(steps), axis=0)
    for t in range(len(steps)):
        changed[t].reshape(-1, 3)[t] ^= 0x55

    before = session.run(x, nll_map=True).nll_map.reshape(-1)
    after = session.run(changed, nll_map=True).nll_map.reshape(len(steps), -1)

    moved = np.abs(after - before) > 1e-5
    np.fill_diagonal(moved, False)
    assert not (moved & (steps[None, :] <= steps[:, None])).any()
    later = (moved & (steps[None, :] > steps[:, None])).any(axis=1)
    assert later.sum() >= (steps < steps.max()).sum() - 1
