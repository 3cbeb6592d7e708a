"""The hierarchical VAE: its bound, the layers of its divergence, its samples."""

from __future__ import annotations

import pytest
import torch
from quadrature import check_bound
from torch import Tensor

from anomalyd.density.base import ImageShape
from anomalyd.density.hvae import HVAE
from anomalyd.detect.runtime import Session
from anomalyd.train.export import check_parity, to_onnx

GREY, BINARY = ImageShape(6, 5, 1), ImageShape(4, 4, 1, levels=2)


def hvae(shape: ImageShape, **options) -> HVAE:
    """A tiny hierarchical VAE whose layers depend on one another."""
    torch.manual_seed(0)
    tiny = {"features": 4, "latents": (3, 2), "hidden": 8, "components": 3}
    density = HVAE(shape, **(tiny | options))
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.mul_(1.5)
    return density


def images(shape: ImageShape, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (n, shape.height, shape.width, shape.channels)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def test_bound_is_a_bound_and_tightens_with_more_samples():
    """Over 10,000 noise banks the mean bound stays below log p(x) and rises with the samples."""
    density = hvae(BINARY, latents=(1, 1), bound="iwae")

    check_bound(density, images(BINARY, 3), (1, 2, 4))


def test_elbo_is_a_bound():
    """The ELBO with its divergences integrated stays below log p(x) too."""
    check_bound(hvae(BINARY, latents=(1, 1)), images(BINARY, 3), (1,))


def test_elbo_splits_into_reconstruction_and_a_divergence_of_each_layer():
    """-ELBO = reconstruction + KL_1 + KL_2 + KL_3, none of them negative."""
    density = hvae(GREY, latents=(4, 3, 2))
    scores = density(images(GREY))
    parts = dict(zip(density.statistics, scores.statistics.unbind(1), strict=True))
    divergences = torch.stack([parts[name] for name in ("kl_1", "kl_2", "kl_3")])

    torch.testing.assert_close(
        -scores.log_likelihood[:, 0], parts["reconstruction"] + divergences.sum(dim=0)
    )
    assert (divergences > 0).all()


def test_posterior_is_the_product_of_image_and_layer_above():
    """q(z_1|z_2, x) is proportional to the image's Gaussian times p(z_1|z_2)."""
    density, x = hvae(GREY), images(GREY, 2)
    inputs = density.centred(density.quantise(x))
    noise = torch.randn(3, 2, 1, density.latent)
    with torch.no_grad():
        _, (lower, upper) = density.infer(inputs, noise)
        features, mu = density.encoder(inputs)
        seen = torch.distributions.Normal(
            mu[:, None], (6 * torch.tanh(density.log_sigma(features) / 6)).exp()[:, None]
        )
        p = torch.distributions.Normal(lower.p.mu, lower.p.log_sigma.exp())
        q = torch.distributions.Normal(lower.q.mu, lower.q.log_sigma.exp())
        ratios = torch.stack(
            [
                q.log_prob(torch.full_like(mu[:, None], z)) - seen.log_prob(z) - p.log_prob(z)
                for z in (torch.tensor(-1.0), torch.tensor(0.3), torch.tensor(2.0))
            ]
        )

    torch.testing.assert_close(ratios[0], ratios[1], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ratios[0], ratios[2], rtol=1e-4, atol=1e-3)
    assert lower.p.mu.std(dim=0).min() > 0  # p(z_1|z_2) follows the draw of z_2
    assert not upper.p.mu.any()


def test_embedding_is_the_mean_of_the_top_layer():
    """The features of an image are the mean of z_L, which no noise moves."""
    density, x = hvae(GREY), images(GREY)
    embedding = density(x).embedding
    density.noise.add_(1)

    assert embedding.shape == (4, 2)
    assert torch.equal(density(x).embedding, embedding)


def test_a_sample_is_drawn_from_the_top_down():
    """All noise counts: a table follows the noise of either layer, and is normalised."""
    density, x = hvae(GREY), images(GREY)
    noise = torch.randn(4, density.latent)
    with torch.no_grad():
        tables = density.log_probs(x, latent=noise)
        for column in range(density.latent):
            moved = noise.clone()
            moved[:, column] += 1
            assert not torch.equal(density.log_probs(x, latent=moved), tables)

    assert density.latent == 5
    assert not density.order.any()
    torch.testing.assert_close(tables.exp().sum(dim=4), torch.ones(4, 6, 5, 1))


def test_one_layer_is_no_hierarchy():
    """Fewer than two layers are a ValueError that says what to use."""
    with pytest.raises(ValueError, match="use a vae"):
        hvae(GREY, latents=(3,))


def test_graph_says_what_torch_says():
    """onnxruntime gives torch's bound, for any number of images and draws."""
    density = hvae(ImageShape(7, 9, 1), bound="iwae", samples=2)
    x = images(density.shape, 20)
    graph = to_onnx(density)

    check_parity(density, graph, x.numpy())
    assert "embedding" in Session(graph, device="cpu").outputs
