"""Companions beside a density, and the surprise that their statistics measure."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from anomalyd.density.base import Bayes, ImageShape, Surprise
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
    assert density.loss_name == "bits/dim of 3 densities together"
    density.main.requires_grad_(False)
    assert density.loss_name == "bits/dim of 2 densities together"
    torch.manual_seed(3)
    loss = density.loss(x)
    loss.backward()

    torch.manual_seed(3)
    torch.testing.assert_close(loss, density.local.loss(x) + density.vae.loss(x))
    assert all(p.grad is None for p in density.main.parameters())
    density.local.requires_grad_(False)
    density.vae.bayes = Bayes(300.0, 1, False, None)
    assert density.loss_name == "bits/dim and weighed labels"
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
@pytest.mark.parametrize("pixel", ["categorical", "hierarchical", "logistic-mixture"])
@pytest.mark.parametrize(("levels", "channels"), [(256, 1), (20, 1), (6, 3)])
def test_a_pixel_s_surprise_has_the_mean_and_variance_that_it_says(pixel, levels, channels):
    """Over all values of one pixel, sum p (nll - mean) = 0 and sum p (nll - mean)^2 = variance."""
    torch.manual_seed(0)
    of_pixel = likelihood(pixel, ImageShape(1, 1, channels, levels), 6, 3)
    every = list(itertools.product(range(levels), repeat=channels))
    values = torch.tensor(every).reshape(-1, 1, 1, channels)
    inputs = values.permute(0, 3, 1, 2) * (2 / (levels - 1)) - 1
    context = torch.randn(1, 6, 1, 1).expand(len(every), -1, -1, -1)
    surprise = of_pixel.surprise(context, values, inputs)
    nll, mean, variance = (part.double().flatten() for part in surprise)
    p = torch.exp(-nll)

    assert float((p * (nll - mean)).sum()) == pytest.approx(0, abs=1e-5)
    assert float((p * (nll - mean).square()).sum()) == pytest.approx(
        float((p * variance).sum()), rel=1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("levels", [256, 20, 2])
@pytest.mark.parametrize("log_scale", [-6.0, -4.0, -1.0, 2.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.1, 0.95, 40.0])
def test_a_mixture_expects_the_band_and_then_the_level_given_the_band(levels, log_scale, mean):
    """At every level, however unlikely, mean and variance are those of the table of all levels."""
    of_pixel = likelihood("logistic-mixture", ImageShape(1, 1, 1, levels), 2, 3)
    scales = [log_scale, log_scale - 1, log_scale + 1]
    of_pixel.parameters_of.weight.zero_()
    of_pixel.parameters_of.bias.copy_(torch.tensor([0, 1, -1, mean, mean + 0.1, 0, *scales]))
    values = torch.arange(levels).reshape(levels, 1, 1, 1)
    context, inputs = torch.zeros(levels, 2, 1, 1), values.float() * (2 / (levels - 1)) - 1
    nll, expected, variance = (
        part.double().flatten() for part in of_pixel.surprise(context, values, inputs)
    )
    log_p = of_pixel.log_probs(context[:1], inputs[:1]).double().flatten()
    bands = log_p.split(math.ceil(math.sqrt(levels)))

    torch.testing.assert_close(nll, -log_p, rtol=1e-4, atol=1e-4)
    between = moments(torch.stack([band.logsumexp(0) for band in bands]))
    within = torch.cat([moments(band).expand(len(band), 2) for band in bands])
    measured = torch.stack([expected, variance], dim=1)
    torch.testing.assert_close(measured, between + within, rtol=1e-3, atol=1e-3)


def moments(log_p: Tensor) -> Tensor:
    """Mean and variance of -log p, p proportional to exp(log_p): (2,)."""
    nll = -torch.log_softmax(log_p, dim=0)
    p = torch.exp(-nll)
    mean = (p * nll).sum()
    return torch.stack([mean, (p * (nll - mean).square()).sum()])


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
