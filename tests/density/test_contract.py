"""One contract for every density, over every likelihood, channel count and bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalyd.density.base import Bayes, Density, ImageShape
from anomalyd.density.ccvae import CCVAE
from anomalyd.density.companions import Companions
from anomalyd.density.gated_pixelcnn import GatedPixelCNN
from anomalyd.density.hvae import HVAE
from anomalyd.density.multiscale import Multiscale
from anomalyd.density.pixelcnn import PixelCNN
from anomalyd.density.pixelcnnpp import PixelCNNPP
from anomalyd.density.pixelrnn import DiagonalBiLSTM, RowLSTM
from anomalyd.density.vae import VAE
from anomalyd.detect.runtime import Session
from anomalyd.train.export import to_onnx

GREY, RGB = ImageShape(6, 5, 1), ImageShape(6, 5, 3)
PIXELS = ("categorical", "hierarchical", "read-out", "logistic-mixture")


def pixelcnn(shape: ImageShape, **options) -> GatedPixelCNN:
    torch.manual_seed(0)
    if options.get("pixel") != "read-out":
        small = {"features": 8, "dilations": (1, 2), "components": 3}
        return GatedPixelCNN(shape, **(small | options))
    density = pixelcnn(shape, **(options | {"pixel": "hierarchical", "readout": 9, "nearby": 3}))
    for layer in (*density.pixel.band_hidden, *density.pixel.inside_hidden):  # zero at first
        torch.nn.init.normal_(layer.down.weight, std=0.3)
    return density


def masked_pixelcnn(shape: ImageShape, **options) -> PixelCNN:
    torch.manual_seed(0)
    return PixelCNN(shape, **({"features": 8, "blocks": 2, "components": 3} | options))


def pixelcnnpp(shape: ImageShape, **options) -> PixelCNNPP:
    torch.manual_seed(0)
    tiny = {"features": (4, 6, 8), "blocks": (1, 0, 1), "components": 3}
    return PixelCNNPP(shape, **(tiny | options))


def row_lstm(shape: ImageShape, **options) -> RowLSTM:
    torch.manual_seed(0)
    return RowLSTM(shape, **({"features": 4, "layers": 2, "components": 3} | options))


def diagonal_bilstm(shape: ImageShape, **options) -> DiagonalBiLSTM:
    torch.manual_seed(0)
    return DiagonalBiLSTM(shape, **({"features": 4, "layers": 2, "components": 3} | options))


def multiscale(shape: ImageShape, **options) -> Multiscale:
    torch.manual_seed(0)
    return Multiscale(shape, **({"features": 8, "layers": 1, "components": 3} | options))


def vae(shape: ImageShape, **options) -> VAE:
    torch.manual_seed(0)
    return VAE(shape, **({"features": 4, "latent": 3, "components": 3} | options))


def ccvae(shape: ImageShape, **options) -> CCVAE:
    torch.manual_seed(0)
    tiny = {"features": 4, "latent": 3, "label_features": 4, "label_hidden": 5, "components": 3}
    density = CCVAE(shape, **({"classes": 3} | tiny | options))
    density.bayes = Bayes(1.0)  # the labeller learns from labels alone
    return density


def hvae(shape: ImageShape, **options) -> HVAE:
    torch.manual_seed(0)
    tiny = {"features": 4, "latents": (3, 2), "hidden": 8, "components": 3}
    return HVAE(shape, **(tiny | options))


def companions(shape: ImageShape, **options) -> Companions:
    main, local = pixelcnn(shape, **options), masked_pixelcnn(shape, blocks=0, kernel=5)
    return Companions(main, local, vae(shape))


AUTOREGRESSIVE = {
    f"pixelcnn-{shape.channels}-{pixel}": (pixelcnn, shape, {"pixel": pixel})
    for shape in (GREY, RGB)
    for pixel in PIXELS
}
AUTOREGRESSIVE |= {
    "masked-pixelcnn-grey": (masked_pixelcnn, GREY, {"pixel": "hierarchical"}),
    "masked-pixelcnn-rgb": (masked_pixelcnn, RGB, {"pixel": "logistic-mixture"}),
    "pixelcnn++-grey": (pixelcnnpp, GREY, {"pixel": "logistic-mixture"}),
    "pixelcnn++-rgb": (pixelcnnpp, RGB, {"pixel": "categorical"}),
    "row-lstm-grey": (row_lstm, GREY, {"pixel": "hierarchical"}),
    "row-lstm-rgb": (row_lstm, RGB, {"pixel": "logistic-mixture"}),
    "diagonal-bilstm-grey": (diagonal_bilstm, GREY, {"pixel": "hierarchical"}),
    "diagonal-bilstm-rgb": (diagonal_bilstm, RGB, {"pixel": "logistic-mixture"}),
    "multiscale-grey": (multiscale, GREY, {"pixel": "hierarchical"}),
    "multiscale-rgb": (multiscale, RGB, {"pixel": "logistic-mixture"}),
    "multiscale-odd-size": (multiscale, ImageShape(9, 9, 1), {"doublings": 3}),
}
DENSITIES = AUTOREGRESSIVE | {
    "vae-grey": (vae, GREY, {}),
    "vae-rgb-categorical": (vae, RGB, {"pixel": "categorical"}),
    "vae-iwae": (vae, GREY, {"bound": "iwae", "samples": 3}),
    "vae-odd-size": (vae, ImageShape(7, 9, 1), {}),
    "vae-classes": (vae, GREY, {"classes": 5}),
    "vae-iwae-classes": (vae, RGB, {"classes": 2, "bound": "iwae", "samples": 2}),
    "companions-grey": (companions, GREY, {"pixel": "hierarchical"}),
    "companions-rgb-classes": (companions, RGB, {"classes": 3}),
    "ccvae-grey": (ccvae, GREY, {}),
    "ccvae-rgb": (ccvae, RGB, {"mirror": True, "pixel": "hierarchical"}),
    "ccvae-iwae": (ccvae, ImageShape(7, 9, 1), {"bound": "iwae", "samples": 3}),
    "hvae-grey": (hvae, GREY, {}),
    "hvae-three-layers": (hvae, RGB, {"latents": (4, 3, 2), "pixel": "hierarchical"}),
    "hvae-iwae": (hvae, ImageShape(7, 9, 1), {"bound": "iwae", "samples": 3}),
}


@pytest.fixture(params=DENSITIES)
def density(request) -> Density:
    make, shape, options = DENSITIES[request.param]
    return make(shape, **options)


@pytest.fixture(params=AUTOREGRESSIVE)
def autoregressive(request) -> Density:
    make, shape, options = AUTOREGRESSIVE[request.param]
    return make(shape, **options)


def images(shape: ImageShape, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (n, shape.height, shape.width, shape.channels)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def test_scores_have_the_shapes_and_types_of_the_contract(density):
    """log_prob is (N,) or (N, K), finite; statistics and map fit the names and the image."""
    x = images(density.shape)
    scores = density(x)

    assert density.log_prob(x).shape == ((4, density.classes) if density.classes else (4,))
    assert scores.log_likelihood.shape == (4, density.classes or 1)
    assert scores.log_likelihood.dtype == torch.float32
    assert scores.statistics.shape == (4, len(density.statistics))
    assert len(density.units) == len(density.statistics)
    assert scores.nll_map.shape == (4, density.shape.height, density.shape.width)
    assert all(torch.isfinite(part).all() for part in scores if part is not None)


def test_every_parameter_learns(density):
    """The training loss sends a gradient to every parameter, and not one of zeros."""
    labels = torch.tensor([0, 1, 1, 0]) if density.classes else None
    density.loss(images(density.shape), labels).backward()

    named = density.named_parameters()
    assert [name for name, p in named if p.grad is None or not p.grad.any()] == []


def test_training_mode_scores_as_evaluation_mode(density):
    """Without dropout the two modes give the same numbers."""
    x = images(density.shape)

    assert torch.equal(density.train().log_prob(x), density.eval().log_prob(x))


def test_one_image_gets_one_score_whatever_its_batch(density):
    """A score does not depend on the other images of the batch, nor on the time of asking."""
    x = images(density.shape)
    together = density.log_prob(x)
    alone = torch.cat([density.log_prob(x[i : i + 1]) for i in range(len(x))])

    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-3)


def test_state_survives_saving(density, tmp_path):
    """Weights stored and loaded into a fresh density give the same scores."""
    x = images(density.shape)
    torch.save(density.state_dict(), tmp_path / "state")
    expected = density.log_prob(x)
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.zero_()
    density.load_state_dict(torch.load(tmp_path / "state", weights_only=True))

    assert torch.equal(density.log_prob(x), expected)


def test_exact_map_sums_to_the_score(autoregressive):
    """For an autoregressive density the map is the score, pixel by pixel."""
    scores = autoregressive(images(autoregressive.shape))

    assert autoregressive.likelihood == "exact"
    total = -scores.nll_map.double().sum(dim=(1, 2))
    torch.testing.assert_close(total.float(), scores.log_likelihood[:, 0])


def test_pixel_sees_only_what_comes_before(autoregressive):
    """Changing a pixel moves none of its own step or before; what follows sees it (no blind spot).

    Before and after are those of `order`, in which several pixels may share a step.
    """
    shape = autoregressive.shape
    steps = autoregressive.order[..., 0].flatten()
    x = images(shape, 1)
    with torch.no_grad():
        before = autoregressive(x).nll_map.flatten()
        seen_by_later = 0
        for t, step in enumerate(steps):
            changed = x.clone()
            changed[0, t // shape.width, t % shape.width] ^= 0x55
            moved = (autoregressive(changed).nll_map.flatten() - before).abs() > 0
            moved[t] = False
            assert not moved[steps <= step].any(), t
            seen_by_later += bool(moved[steps > step].any())

    assert seen_by_later >= int((steps < steps.max()).sum()) - 1


@pytest.mark.parametrize("pixel", PIXELS)
def test_earlier_channels_inform_later_ones(pixel):
    """Within one pixel each pair of channels is dependent: blue is not drawn blind to red."""
    density = pixelcnn(ImageShape(1, 1, 3, levels=4), pixel=pixel)
    with torch.no_grad():
        for parameter in density.pixel.parameters():
            parameter.add_(torch.randn_like(parameter))
        every = torch.tensor(list(itertools.product([0, 64, 128, 192], repeat=3)))
        joint = density.log_prob(every.to(torch.uint8).reshape(-1, 1, 1, 3)).double().exp()

    table = joint.reshape(4, 4, 4)
    for unused in range(3):
        pair = table.sum(dim=unused)
        independent = pair.sum(dim=1, keepdim=True) * pair.sum(dim=0, keepdim=True)
        assert (pair - independent).abs().max() > 1e-4


@pytest.mark.parametrize("pixel", PIXELS)
def test_density_sums_to_one_over_all_binary_images(pixel):
    """exp(log_prob) over all 512 binary 3x3 images adds up to one, exactly."""
    density = pixelcnn(ImageShape(3, 3, 1, levels=2), pixel=pixel)
    every = torch.tensor(list(itertools.product([0, 255], repeat=9)), dtype=torch.uint8)

    with torch.no_grad():
        total = density.log_prob(every.reshape(-1, 3, 3, 1)).double().exp().sum()

    assert total.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pixel", PIXELS)
def test_density_sums_to_one_over_all_colours(pixel):
    """exp(log_prob) over all 4^6 images of two RGB pixels with four levels adds up to one."""
    density = pixelcnn(ImageShape(1, 2, 3, levels=4), pixel=pixel)
    every = torch.tensor(list(itertools.product([0, 64, 128, 192], repeat=6)), dtype=torch.uint8)

    with torch.no_grad():
        total = density.log_prob(every.reshape(-1, 1, 2, 3)).double().exp().sum()

    assert total.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pixel", [*PIXELS, "bernoulli"])
def test_density_of_each_class_sums_to_one(pixel):
    """p(x|y) adds up to one over all 512 binary 3x3 images, for each of three unlike classes."""
    density = pixelcnn(ImageShape(3, 3, 1, levels=2), classes=3, pixel=pixel)
    every = torch.tensor(list(itertools.product([0, 255], repeat=9)), dtype=torch.uint8)
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        p = density.log_prob(every.reshape(-1, 3, 3, 1)).double().exp()

    torch.testing.assert_close(p.sum(dim=0), torch.ones(3).double(), rtol=0, atol=1e-5)
    assert (p[:, :1] / p[:, 1:]).log().abs().mean() > 0.1


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("pixel", PIXELS)
def test_pixel_likelihood_sums_to_one_over_256_levels_of_three_channels(pixel, spread):
    """Over all blues p(r, g, b) is p(r) p(g|r), each of which sums to one over 256 levels."""
    density = pixelcnn(ImageShape(1, 1, 3), pixel=pixel)
    ends = torch.tensor([0, 1, 100, 254, 255])
    red, green = torch.cartesian_prod(ends, ends).T
    blue = torch.arange(256)
    with torch.no_grad():
        for parameter in density.pixel.parameters():
            parameter.mul_(spread)
        pairs = torch.stack([red, green], dim=1).repeat_interleave(256, dim=0)
        every = torch.cat([pairs, blue.repeat(25).unsqueeze(1)], dim=1).to(torch.uint8)
        total = density.log_prob(every.reshape(-1, 1, 1, 3)).double().exp().reshape(25, 256).sum(1)
        table = density.log_probs(every[::256].reshape(-1, 1, 1, 3))[:, 0, 0].double().exp()

    torch.testing.assert_close(table.sum(dim=2), torch.ones(25, 3).double(), rtol=0, atol=1e-4)
    place = torch.arange(25)
    torch.testing.assert_close(
        total, table[place, 0, red] * table[place, 1, green], rtol=1e-3, atol=1e-12
    )


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("pixel", PIXELS)
def test_pixel_likelihood_sums_to_one_over_256_levels(pixel, spread):
    """All 256 levels of one pixel have total probability one, however extreme the weights."""
    density = pixelcnn(ImageShape(1, 1, 1), pixel=pixel)
    with torch.no_grad():
        for parameter in density.pixel.parameters():
            parameter.mul_(spread)
        every = torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 1, 1)
        total = density.log_prob(every).double().exp().sum()

    assert total.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("make", [pixelcnn, pixelcnnpp, vae, ccvae, companions])
def test_a_class_cannot_be_left_out(make):
    """Without labels there is no p(x|y) to learn or to draw from: a ValueError, not nonsense."""
    density = make(GREY, classes=3)
    x = images(GREY)
    latent = torch.zeros(4, density.latent) if density.latent else None

    for call in (density.losses, density.loss, lambda x: density.log_probs(x, latent=latent)):
        with pytest.raises(ValueError, match="3 classes needs `labels`"):
            call(x)


def test_vertical_stack_is_computed_once_for_all_classes():
    """Four classes cost four passes of the horizontal stack, and one of the vertical one."""
    density = pixelcnn(GREY, classes=4)
    seen = []
    for layer in density.layers:
        layer.register_forward_hook(lambda _, x, __: seen.append((len(x[0]), len(x[1]))))
    density(images(density.shape))

    assert seen == [(4, 16), (4, 16)]


def test_exported_classes_are_those_of_a_call_each():
    """Column k of the graph's log-likelihoods is what the class k alone gives."""
    density = pixelcnn(GREY, classes=3).eval()
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    session = Session(to_onnx(density), device="cpu", threads=1)
    x = images(GREY)
    found = session.run(x.numpy()).log_likelihood
    for label in range(3):
        with torch.no_grad():
            maps = density.nll_maps(x, torch.full((4, 1), label))

        expected = -maps.double().sum(dim=(1, 2, 3)).numpy()
        np.testing.assert_allclose(found[:, label], expected, rtol=1e-5)
    assert (found.std(axis=1) > 0.1).all()


def test_log_likelihood_survives_extreme_weights():
    """A pixel a thousand scales away from every component still has a finite log-likelihood."""
    density = pixelcnn(GREY, pixel="logistic-mixture")
    with torch.no_grad():
        density.pixel.parameters_of.weight.mul_(1e3)

    assert torch.isfinite(density.log_prob(images(GREY))).all()


@pytest.mark.parametrize(
    ("make", "shape", "options", "words"),
    [
        (pixelcnn, GREY, {"kernel": 4}, "odd"),
        (pixelcnn, GREY, {"pixel": "gaussian"}, "one of categorical"),
        (pixelcnn, ImageShape(6, 5, 2), {}, "1 or 3 channels"),
        (pixelcnn, ImageShape(6, 5, 1, levels=1), {}, "2..256"),
        (vae, ImageShape(3, 8, 1), {}, "4x4"),
        (vae, GREY, {"bound": "chain"}, "elbo or iwae"),
        (vae, GREY, {"samples": 0}, "at least 1"),
        (hvae, ImageShape(3, 8, 1), {}, "4x4"),
        (ccvae, GREY, {"classes": 0}, "at least 2 classes"),
    ],
)
def test_impossible_options_are_refused_with_a_reason(make, shape, options, words):
    """What a density cannot be is a ValueError that names the rule."""
    with pytest.raises(ValueError, match=words):
        make(shape, **options)
