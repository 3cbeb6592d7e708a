"""Companions beside a density, and the surprise that their statistics measure."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from anomalyd.density.base import ImageShape, Surprise
from anomalyd.density.companions import Companions
from anomalyd.density.gated_pixelcnn import GatedPixelCNN
from anomalyd.density.likelihoods import likelihood
from anomalyd.density.pixelcnn import PixelCNN
from anomalyd.density.summary import deviation, excess, excess_map
from anomalyd.density.vae import VAE
from anomalyd.errors import TrainingError
from anomalyd.train.weights import start_from

SHAPE = ImageShape(6, 5, 1)
BINARY = ImageShape(3, 3, 1, 2)


def companions(shape: ImageShape = SHAPE) -> Companions:
    torch.manual_seed(0)
    main = GatedPixelCNN(shape, features=8, dilations=(1, 2))
    return Companions(main, PixelCNN(shape, features=6, blocks=0, kernel=5), VAE(shape, latent=3))


def some_images(n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, *SHAPE[:3]), dtype=torch.uint8, generator=generator)


def every_binary_image() -> Tensor:
    bits = torch.tensor(list(itertools.product((0, 255), repeat=9)), dtype=torch.uint8)
    return bits.reshape(-1, 3, 3, 1)


def test_the_likelihood_is_the_main_density_s_alone():
    """Companions change neither log p(x) nor the map; they add statistics by name."""
    density, x = companions(), some_images()
    scores, alone = density(x), density.main(x)

    assert torch.equal(scores.log_likelihood, alone.log_likelihood)
    assert torch.equal(scores.nll_map, alone.nll_map)
    columns = dict(zip(density.statistics, scores.statistics.T, strict=True))
    local = -density.local.log_prob(x)
    torch.testing.assert_close(columns["local_nll"], local)
    torch.testing.assert_close(columns["nll_over_local"], -alone.log_likelihood[:, 0] - local)
    vae = dict(zip(density.vae.statistics, density.vae(x).statistics.T, strict=True))
    torch.testing.assert_close(columns["vae_kl"], vae["kl"])
    torch.testing.assert_close(columns["vae_over_local"], vae["reconstruction"] - local)


def test_a_frozen_part_neither_learns_nor_costs():
    """With main frozen the loss is that of the companions, and no gradient reaches main."""
    density, x = companions(), some_images()
    density.main.requires_grad_(False)
    torch.manual_seed(3)
    loss = density.loss(x)
    loss.backward()

    torch.manual_seed(3)
    torch.testing.assert_close(loss, density.local.loss(x) + density.vae.loss(x))
    assert all(p.grad is None for p in density.main.parameters())
    torch.testing.assert_close(density.losses(x), density.local.losses(x) + density.vae.losses(x))


def test_weights_move_in_and_out_of_companions():
    """A density starts the same one with companions, and a VAE is taken out of them."""
    density, alone = companions(), GatedPixelCNN(SHAPE, features=8, dilations=(1, 2))
    taken = start_from(density, alone.state_dict())
    assert len(taken) == len(alone.state_dict())
    assert torch.equal(density.main.first_vertical.conv.weight, alone.first_vertical.conv.weight)

    vae = VAE(SHAPE, latent=3)
    assert set(start_from(vae, density.state_dict())) == set(vae.state_dict())
    assert torch.equal(vae.encoder.code.weight, density.vae.encoder.code.weight)
    with pytest.raises(TrainingError, match="no kernel"):
        start_from(VAE(SHAPE, features=7, latent=5), {"main.x": torch.zeros(1)})


@torch.no_grad()
def test_surprise_is_expected_to_be_what_it_is():
    """Summed over all 3x3 binary images, p(x) (nll - mean) is 0 and its square the variance."""
    torch.manual_seed(0)
    density = GatedPixelCNN(BINARY, features=8, dilations=(1, 2), pixel="bernoulli")
    surprise = Surprise(*(maps[:, 0].double() for maps in density.surprises(every_binary_image())))
    p = torch.exp(-surprise.nll.sum(dim=(1, 2)))
    off = (surprise.nll - surprise.mean).sum(dim=(1, 2))

    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert float((p * off).sum()) == pytest.approx(0, abs=1e-5)
    variance = (p * surprise.variance.sum(dim=(1, 2))).sum()
    assert float((p * off.square()).sum()) == pytest.approx(float(variance), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pixel", ["categorical", "hierarchical"])
@pytest.mark.parametrize("levels", [256, 20])
def test_a_pixel_s_surprise_has_the_mean_and_variance_that_it_says(pixel, levels):
    """Over all levels of one pixel, sum p (nll - mean) = 0 and sum p (nll - mean)^2 = variance."""
    torch.manual_seed(0)
    shape = ImageShape(1, 1, 1, levels)
    of_pixel = likelihood(pixel, shape, 6, 3)
    values = torch.arange(levels).reshape(levels, 1, 1, 1)
    context = torch.randn(1, 6, 1, 1).expand(levels, -1, -1, -1)
    surprise = of_pixel.surprise(context, values, torch.zeros(levels, 1, 1, 1))
    nll, mean, variance = (part.double().flatten() for part in surprise)
    p = torch.exp(-nll)

    assert float((p * (nll - mean)).sum()) == pytest.approx(0, abs=1e-5)
    assert float((p * (nll - mean).square()).sum()) == pytest.approx(
        float((p * variance).sum()), rel=1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("log_scale", [-4.0, -2.0])
def test_a_logistic_s_expected_surprise_is_close_to_its_entropy(log_scale):
    """One component, far from the edges: the approximation is within 0.2 nats."""
    shape = ImageShape(1, 1, 1)
    of_pixel = likelihood("logistic-mixture", shape, 2, 1)
    with torch.no_grad():
        of_pixel.parameters_of.weight.zero_()
        of_pixel.parameters_of.bias.copy_(torch.tensor([0.0, 0.0, log_scale]))
    context = torch.zeros(256, 2, 1, 1)
    values = torch.arange(256).reshape(256, 1, 1, 1)
    inputs = values.float() * (2 / 255) - 1
    nll, mean, _ = (part.double().flatten() for part in of_pixel.surprise(context, values, inputs))

    entropy = float((torch.exp(-nll) * nll).sum())
    assert float(mean[0]) == pytest.approx(entropy, abs=0.2)


def test_summaries_of_a_map():
    """A map that is surprised as expected has no excess; a surprise of 4 sd in 4 pixels has 4."""
    mean, variance = torch.full((1, 2, 2), 1.5), torch.full((1, 2, 2), 0.9)
    calm = Surprise(mean, mean, variance)
    assert float(excess(calm)) == 0
    assert float(excess_map(calm).abs().max()) == 0
    assert float(deviation(excess_map(calm))) < -10

    strange = Surprise(mean + 1.0, mean, variance)
    assert float(excess(strange)) == pytest.approx(4 / (1 + 3.6) ** 0.5)
    torch.testing.assert_close(excess_map(strange), torch.ones(1, 2, 2))
    assert float(deviation(excess_map(strange))) == pytest.approx(0, abs=1e-5)
