"""A classifier and a density composed: p(x|y) by Bayes' rule, on a model small enough to count."""

from __future__ import annotations

import itertools

import pytest
import torch

from anomalyd.density.base import Bayes, ImageShape
from anomalyd.density.classifier import Classifier
from anomalyd.density.composed import Composed
from anomalyd.density.gated_pixelcnn import GatedPixelCNN
from anomalyd.density.pixelcnn import PixelCNN
from anomalyd.density.vae import VAE

SHAPE = ImageShape(4, 4, 1, 2)
GREY = ImageShape(8, 8, 1)


@pytest.fixture(scope="module")
def parts() -> tuple[PixelCNN, Classifier]:
    torch.manual_seed(0)
    density = PixelCNN(SHAPE, features=6, blocks=1, kernel=3, pixel="categorical").eval()
    classifier = Classifier(SHAPE, 3, features=4, latent=4, hidden=8).eval()
    with torch.no_grad():
        classifier.out.weight.mul_(8)  # so that classes differ
    return density, classifier


@pytest.fixture(scope="module")
def every_image() -> torch.Tensor:
    bits = torch.tensor(list(itertools.product((0, 255), repeat=16)), dtype=torch.uint8)
    return bits.reshape(-1, 4, 4, 1)


@torch.no_grad()
def test_p_of_x_given_y_sums_to_one_where_p_of_y_is_the_model_s_own(parts, every_image):
    """With p(y) = sum over x of p(y|x) p(x), all 65,536 images of each class sum to 1."""
    density, classifier = parts
    p = density.log_prob(every_image).double().exp()
    shares = classifier(every_image).log_posterior.double().exp().T @ p
    joined = Composed(density, classifier, shares.tolist()).eval()
    totals = joined.log_prob(every_image).double().exp().sum(dim=0)

    torch.testing.assert_close(totals, torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)


@torch.no_grad()
def test_sampling_tells_how_far_p_of_x_given_y_is_from_normalised(parts, every_image):
    """Its total is E[p(y|x)] / p(y) over images drawn from p(x): within 4 standard errors."""
    density, classifier = parts
    priors = [0.5, 0.3, 0.2]
    joined = Composed(density, classifier, priors).eval()
    totals = joined.log_prob(every_image).double().exp().sum(dim=0)
    p = density.log_prob(every_image).double().exp()
    drawn = torch.multinomial(p, 20_000, True, generator=torch.Generator().manual_seed(0))
    posterior = classifier(every_image[drawn]).log_posterior.double().exp()
    ratio = posterior / torch.tensor(priors)
    error = ratio.std(dim=0) / 20_000**0.5

    assert ((ratio.mean(dim=0) - totals).abs() <= 4 * error).all()


@torch.no_grad()
def test_its_parts_come_back(parts, every_image):
    """Summed over y with p(y) it is p(x); its posterior is the classifier's."""
    density, classifier = parts
    priors = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    joined = Composed(density, classifier, priors.tolist()).eval()
    x = every_image[::977]
    joint = joined.log_prob(x).double() + priors.log()

    near = {"atol": 1e-4, "rtol": 1e-5}  # of float32 sums of a hundred nats
    torch.testing.assert_close(joint.logsumexp(dim=1), density.log_prob(x).double(), **near)
    posterior = joint - joint.logsumexp(dim=1, keepdim=True)
    torch.testing.assert_close(posterior, classifier(x).log_posterior.double(), **near)


def clothes(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 8, 8, 1), dtype=torch.uint8, generator=generator)
    return images, torch.arange(n) % 3


@pytest.mark.parametrize("kind", ["vae", "gated"])
def test_training_weighs_the_posterior(kind):
    """The loss is -log p(x|y) - w log p(y|x), and steps on it tell training images apart."""
    torch.manual_seed(0)
    options = {"features": 4} if kind == "vae" else {"features": 6, "dilations": (1,)}
    model = (VAE if kind == "vae" else GatedPixelCNN)(GREY, 3, **options)
    images, labels = clothes()
    model.eval()
    torch.manual_seed(1)
    plain = model.loss(images, labels)
    model.bayes = Bayes(30.0)
    log_p = model.log_prob(images)
    wrong = torch.nn.functional.cross_entropy(log_p.float(), labels)
    expected = plain + model.bits_per_dim(-30 * wrong)
    torch.manual_seed(1)  # a bound is trained under fresh noise
    torch.testing.assert_close(model.loss(images, labels), expected, rtol=1e-4, atol=1e-4)

    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(images, labels).backward()
        optimizer.step()
    assert (model.eval().log_prob(images).argmax(dim=1) == labels).all()
