"""The VAE: its bound, its classes, its samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from quadrature import check_bound, exact_log_p
from torch import Tensor

from anomalyd.density.base import ImageShape
from anomalyd.density.vae import VAE
from anomalyd.detect.runtime import Session
from anomalyd.train.export import check_parity, to_onnx

GREY, RGB = ImageShape(6, 5, 1), ImageShape(6, 5, 3)
BINARY = ImageShape(4, 4, 1, levels=2)


def vae(shape: ImageShape, classes: int = 0, **options) -> VAE:
    """A tiny VAE whose classes differ."""
    torch.manual_seed(0)
    density = VAE(shape, classes, **({"features": 4, "latent": 3, "components": 3} | options))
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.mul_(1.5)
        if classes:
            density.prior.copy_(torch.randn_like(density.prior) / 2)
    return density


def images(shape: ImageShape, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (n, shape.height, shape.width, shape.channels)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("classes", [0, 2])
def test_bound_is_a_bound_and_tightens_with_more_samples(classes):
    """Over 10,000 noise banks the mean bound stays below log p and rises with the samples."""
    density = vae(BINARY, classes, latent=1, bound="iwae")

    check_bound(density, images(BINARY, 3), (1, 2, 4))


def test_elbo_is_a_bound():
    """The ELBO with its divergence integrated stays below log p(x) too."""
    check_bound(vae(BINARY, latent=1), images(BINARY, 3), (1,))


def test_exact_density_of_the_tiny_vae_sums_to_one():
    """What the bound is held against is a distribution: all 65,536 binary images sum to one."""
    density = vae(BINARY, latent=1, pixel="bernoulli")
    every = torch.tensor(list(itertools.product([0, 255], repeat=16)), dtype=torch.uint8)
    every = every.reshape(-1, 4, 4, 1)

    log_p = exact_log_p(density, every, nodes=141)  # coarser, for there are many images

    finer = exact_log_p(density, every[::999])
    torch.testing.assert_close(log_p[::999], finer, rtol=0, atol=1e-4)
    assert log_p.std() > 0.1
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=torch.float64))


def test_elbo_splits_into_reconstruction_and_divergence():
    """-ELBO = reconstruction + KL, and the divergence is never negative."""
    density = vae(GREY)
    scores = density(images(GREY))
    reconstruction, kl = scores.statistics[:, 0], scores.statistics[:, 1]

    torch.testing.assert_close(-scores.log_likelihood[:, 0], reconstruction + kl)
    assert (kl >= 0).all()


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_one_pass_over_all_classes_is_a_pass_for_each(bound):
    """(N, K) bounds in one call equal those of K densities that know one class alone."""
    options = {"bound": bound, "samples": 3}
    density, x = vae(GREY, 4, **options), images(GREY)
    alone = []
    for label in range(4):
        single = vae(GREY, 1, **options)
        state = density.state_dict()
        single.load_state_dict(state | {"prior": state["prior"][label : label + 1]})
        alone.append(single.log_prob(x))

    together = density.log_prob(x)
    assert together.shape == (4, 4)
    assert together.std(dim=1).min() > 0.01
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_a_label_trains_its_own_class():
    """Of the priors, the loss moves the labelled one alone."""
    density = vae(GREY, 4)
    density.loss(images(GREY), torch.tensor([2, 2, 0, 2])).backward()

    moved = density.prior.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [True, False, True, False]


def test_losses_are_those_of_the_labelled_class():
    """Validation reads the bound under an image's own class."""
    density, x = vae(GREY, 4), images(GREY)
    labels = torch.tensor([0, 1, 2, 3])

    expected = density.bits_per_dim(density.log_prob(x).diagonal())
    torch.testing.assert_close(density.losses(x, labels), expected)


def test_statistics_are_those_of_the_likeliest_class():
    """With classes the divergence is that of the class the image fits best."""
    scores = vae(GREY, 4)(images(GREY))

    reconstruction, kl = scores.statistics[:, 0], scores.statistics[:, 1]
    torch.testing.assert_close(-scores.log_likelihood.amax(dim=1), reconstruction + kl)


def test_embedding_is_the_mean_of_the_posterior():
    """The features of an image are mu, which no noise moves."""
    density, x = vae(GREY), images(GREY)
    embedding = density(x).embedding
    density.noise.add_(1)

    assert embedding.shape == (4, density.latent)
    assert torch.equal(density(x).embedding, embedding)
    norm = density(x).statistics[:, density.statistics.index("mu_norm")]
    torch.testing.assert_close(embedding.norm(dim=1), norm)


@pytest.mark.parametrize("pixel", ["categorical", "hierarchical", "logistic-mixture"])
def test_table_agrees_with_the_score_given_z(pixel):
    """The sampling table holds, for the values that are there, -nll_map under the same z."""
    density, x = vae(RGB, pixel=pixel), images(RGB)
    with torch.no_grad():
        density.log_sigma.weight.zero_()
        density.log_sigma.bias.fill_(-1000)  # bounded: sigma is e^-6, and z nearly mu
        density.noise.zero_()
        scores = density(x)
        tables = density.log_probs(x, latent=scores.embedding)

    torch.testing.assert_close(tables.exp().sum(dim=4), torch.ones(4, 6, 5, 3))
    chosen = tables.gather(4, density.quantise(x).unsqueeze(4)).sum(dim=(3, 4))
    torch.testing.assert_close(-chosen, scores.nll_map, rtol=1e-4, atol=1e-4)


def test_a_sample_takes_one_step_a_channel():
    """Given z all pixels are independent: only the channels of a pixel follow one another."""
    density, x = vae(RGB, pixel="categorical"), images(RGB)
    z = torch.randn(4, density.latent)
    changed = x.clone()
    changed[..., 1] ^= 0x55
    with torch.no_grad():
        moved = density.log_probs(x, latent=z) != density.log_probs(changed, latent=z)

    assert density.order.tolist() == torch.tensor([0, 1, 2]).expand(6, 5, 3).tolist()
    assert not moved[:, :, :, :2].any()
    assert moved[:, :, :, 2].any()


def test_a_class_moves_the_noise_to_its_prior():
    """A labelled sample starts from mu_y + sigma_y * noise."""
    density, x = vae(GREY, 4), images(GREY)
    labels, noise = torch.tensor([3, 1, 0, 2]), torch.randn(4, density.latent)
    mu, log_sigma = density.prior[labels].chunk(2, dim=1)
    plain = vae(GREY)
    plain.load_state_dict({k: v for k, v in density.state_dict().items() if k != "prior"})

    torch.testing.assert_close(
        density.log_probs(x, labels, noise),
        plain.log_probs(x, latent=mu + (6 * torch.tanh(log_sigma / 6)).exp() * noise),
    )


@pytest.mark.parametrize(
    ("classes", "given", "words"),
    [(0, {}, "latent"), (2, {"latent": torch.zeros(4, 3)}, "labels")],
)
def test_a_sample_needs_noise_and_its_class(classes, given, words):
    """Without what z is drawn by there is a ValueError that names it."""
    with pytest.raises(ValueError, match=words):
        vae(GREY, classes).log_probs(images(GREY), **given)


def test_bernoulli_pixels_are_for_two_levels_only():
    """Bytes under a Bernoulli are refused; binary images get its exact two probabilities."""
    with pytest.raises(ValueError, match="2 levels, not 256"):
        vae(GREY, pixel="bernoulli")

    density = vae(BINARY, pixel="bernoulli")
    tables = density.log_probs(images(BINARY), latent=torch.randn(4, 3))
    torch.testing.assert_close(tables.exp().sum(dim=4), torch.ones(4, 4, 4, 1))


def test_graph_of_a_conditional_vae_says_what_torch_says():
    """onnxruntime gives (N, K) bounds and the embedding of torch, for any number of images."""
    density = vae(ImageShape(7, 9, 1), 3, bound="iwae", samples=2)
    x = images(density.shape, 20)
    graph = to_onnx(density)

    check_parity(density, graph, x.numpy())
    session = Session(graph, device="cpu")
    assert session.run(x.numpy()).log_likelihood.shape == (20, 3)
    assert "embedding" in session.outputs


def test_codes_and_logistics_keep_their_precision_under_autocast():
    """Where autocast would multiply in bfloat16, codes and bounds are those of float32."""
    density, x = vae(RGB, 3), images(RGB)
    labels = torch.tensor([0, 1, 2, 0])
    plain = density.losses(x, labels), density.class_evidence(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = density.losses(x, labels), density.class_evidence(x)

    assert all(torch.equal(one, other) for one, other in zip(plain, mixed, strict=True))
