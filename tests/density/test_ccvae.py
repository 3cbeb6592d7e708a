"""The VAE with a code for labels: its bound, its posterior, what its labeller learns from."""

from __future__ import annotations

import itertools

import pytest
import torch
from quadrature import check_bound
from torch import Tensor

from anomalyd.density.base import Bayes, ImageShape
from anomalyd.density.ccvae import CCVAE
from anomalyd.density.classifier import Classifier
from anomalyd.detect.runtime import Session
from anomalyd.train.export import check_parity, to_onnx
from anomalyd.train.weights import start_from

GREY, BINARY = ImageShape(6, 5, 1), ImageShape(4, 4, 1, levels=2)
LABELS = torch.tensor([0, 1, 2, 1])
TINY = {"features": 4, "latent": 3, "label_features": 4, "label_hidden": 8, "components": 3}


def ccvae(shape: ImageShape = GREY, classes: int = 3, **options) -> CCVAE:
    torch.manual_seed(0)
    return CCVAE(shape, classes, **(TINY | options)).eval()


def images(shape: ImageShape = GREY, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (n, shape.height, shape.width, shape.channels)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("bound", "samples"), [("elbo", (1,)), ("iwae", (1, 2, 4))])
def test_bound_is_a_bound_for_every_class(bound, samples):
    """Over 10,000 noise banks the mean bound of either class stays below log p(x|y)."""
    density = ccvae(BINARY, 2, latent=1, bound=bound)
    with torch.no_grad():
        density.prior.copy_(torch.randn_like(density.prior) / 2)
        density.decoder.start.weight.mul_(3)

    check_bound(density, images(BINARY, 2), samples)


@pytest.mark.parametrize("mirror", [False, True])
def test_posterior_is_at_first_the_labellers(mirror):
    """Bayes' rule on the untrained bounds gives softmax(l(x)) back."""
    density, x = ccvae(mirror=mirror), images()
    with torch.no_grad():
        density.labeller.out.weight.mul_(20)
        posterior = torch.log_softmax(density.log_prob(x), dim=1)
        said = density.labeller(x).log_posterior

    assert said.std() > 0.1
    torch.testing.assert_close(posterior, said, rtol=1e-3, atol=1e-3)


def test_bound_splits_into_reconstruction_and_two_divergences():
    """-ELBO = reconstruction + KL of w + KL of z under the likeliest class, none negative."""
    density = ccvae()
    scores = density(images())
    assert density.statistics[:3] == ("reconstruction", "kl_1", "kl_2")

    torch.testing.assert_close(
        -scores.log_likelihood.amax(dim=1), scores.statistics[:, :3].sum(dim=1)
    )
    assert (scores.statistics[:, 1:3] >= 0).all()


def test_the_labeller_learns_from_labels_alone():
    """The bound sends it no gradient; the posterior's term does."""
    density = ccvae()
    density.loss(images(), LABELS).backward()
    assert all(parameter.grad is None for parameter in density.labeller.parameters())
    density.bayes = Bayes(1.0)
    density.loss(images(), LABELS).backward()
    assert all(parameter.grad is not None for parameter in density.labeller.parameters())


def test_a_classifier_is_the_start_of_the_labeller():
    """Its weights go there, though the encoder of z has the same size."""
    torch.manual_seed(1)
    classifier = Classifier(GREY, 3, features=4, hidden=8)
    density = ccvae(latent=32)
    untouched = density.encoder.code.weight.clone()
    taken = start_from(density, classifier.state_dict(), "labeller.")

    assert set(taken) == {f"labeller.{name}" for name in classifier.state_dict()}
    x = images()
    assert torch.equal(density.labeller(x).log_posterior, classifier.eval()(x).log_posterior)
    assert torch.equal(density.encoder.code.weight, untouched)


def test_samples_of_a_class_come_from_its_own_prior():
    """With one noise, another label is another image; classes of one prior are one image."""
    density = ccvae()
    noise = torch.randn(1, density.latent)

    def drawn():
        with torch.no_grad():
            return [density.generate(noise, torch.tensor([label])) for label in range(3)]

    apart = drawn()
    assert min((a - b).abs().max() for a, b in itertools.combinations(apart, 2)) > 1e-3
    with torch.no_grad():
        density.prior[1] = density.prior[0]
    alike = drawn()
    assert torch.equal(alike[0], apart[0])
    assert torch.equal(alike[1], alike[0])
    assert torch.equal(alike[2], apart[2])


def test_graph_says_what_the_model_says():
    """One call of the exported graph gives (N, K) bounds, the statistics and both codes."""
    density, x = ccvae(mirror=True), images()
    graph = to_onnx(density)
    check_parity(density, graph, x.numpy())
    raw = Session(graph, device="cpu", threads=1).run(x.numpy())

    assert raw.log_likelihood.shape == (4, 3)
    assert raw.embedding.shape == (4, 3 + 3)
