"""The models that keep an encoder and no density: autoencoder and classifier."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from anomalyd.density.autoencoder import Autoencoder
from anomalyd.density.base import ImageShape, Model
from anomalyd.density.classifier import Classifier
from anomalyd.density.gated_pixelcnn import GatedPixelCNN
from anomalyd.density.hvae import HVAE
from anomalyd.density.jitter import jittered
from anomalyd.density.vae import VAE
from anomalyd.detect.runtime import Session
from anomalyd.errors import TrainingError
from anomalyd.train.export import check_parity, to_onnx
from anomalyd.train.weights import start_from

GREY, RGB = ImageShape(8, 9, 1), ImageShape(8, 9, 3)
SMALL = {"features": 4, "latent": 3}


def autoencoder(shape: ImageShape) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(shape, **SMALL)


def classifier(shape: ImageShape, **options) -> Classifier:
    torch.manual_seed(0)
    return Classifier(shape, 5, hidden=8, **(SMALL | options))


@pytest.fixture(params=[autoencoder, classifier])
def model(request) -> Model:
    return request.param(RGB)


def images(shape: ImageShape, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (n, shape.height, shape.width, shape.channels)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


LABELS = torch.tensor([0, 4, 2, 2])


def test_every_parameter_learns(model):
    """The training loss, a scalar, sends a gradient to every parameter."""
    model.train().loss(images(RGB), LABELS).backward()

    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_one_image_gets_one_answer_whatever_its_batch(model):
    """An answer does not depend on the other images of the batch."""
    x = images(RGB)
    together = model.eval()(x)
    alone = [model(x[i : i + 1]) for i in range(4)]

    for field, values in together._asdict().items():
        parts = torch.cat([getattr(one, field) for one in alone])
        torch.testing.assert_close(parts, values, rtol=1e-4, atol=1e-5)
    assert together.statistics.shape == (4, len(model.statistics))
    assert len(model.units) == len(model.statistics)


def test_validation_has_no_noise(model):
    """The losses of evaluation mode are the same twice, one for each image."""
    x = images(RGB)
    losses = model.eval().losses(x, LABELS)

    assert losses.shape == (4,)
    assert torch.equal(model.losses(x, LABELS), losses)
    torch.testing.assert_close(model.loss(x, LABELS), losses.mean())


def test_autoencoder_measures_its_reconstruction():
    """The statistic is the loss, the mean of squared differences, and falls when trained."""
    model, x = autoencoder(GREY), images(GREY)
    before = model(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()

    torch.testing.assert_close(before.statistics[:, 0], autoencoder(GREY).losses(x))
    assert before.embedding.shape == (4, 3)
    assert model.loss(x) < 0.8 * before.statistics[:, 0].mean()


@pytest.mark.parametrize("method", ["log_prob", "log_probs"])
def test_autoencoder_has_no_density(method):
    """Asked for a log-likelihood, or for what a sample is drawn from, it says so."""
    with pytest.raises(TypeError, match="no density"):
        getattr(autoencoder(GREY), method)(images(GREY))


def test_classifier_gives_a_distribution_over_classes():
    """exp(log_posterior) sums to one; the statistics are its maximum and its entropy."""
    said = classifier(GREY).eval()(images(GREY))
    posterior = said.log_posterior.exp()

    torch.testing.assert_close(posterior.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(said.statistics[:, 0], posterior.amax(dim=1))
    assert (said.statistics[:, 1] > 0).all()
    assert (said.statistics[:, 1] <= math.log(5) + 1e-6).all()


def test_classifier_loss_is_the_cross_entropy():
    """Validation averages -log p(y|x) of the label."""
    model, x = classifier(GREY).eval(), images(GREY)

    log_posterior = model(x).log_posterior
    torch.testing.assert_close(model.losses(x, LABELS), -log_posterior[range(4), LABELS])


def test_classifier_learns_from_labels_only():
    """Without labels, or with one class, there is a ValueError that names what is missing."""
    with pytest.raises(ValueError, match="labels"):
        classifier(GREY).loss(images(GREY))
    for classes in (0, 1):
        with pytest.raises(ValueError, match="--labels"):
            Classifier(GREY, classes)


@pytest.mark.parametrize("mirror", [False, True])
def test_a_reflection_has_the_same_class_where_that_is_said(mirror):
    """With `mirror` an image and its reflection get one posterior; without, each its own."""
    torch.manual_seed(0)
    model, x = Classifier(GREY, 5, mirror=mirror).eval(), images(GREY)
    both = [model(view).log_posterior for view in (x, x.flip(2))]

    assert torch.allclose(*both, atol=1e-5) == mirror
    torch.testing.assert_close(both[0].exp().sum(dim=1), torch.ones(4))


def test_augmentation_moves_and_mirrors_whole_images():
    """Training sees every image moved by up to `shift` pixels, its edge repeated, or mirrored."""
    x = images(ImageShape(4, 5, 1), 1)
    padded = torch.nn.functional.pad(
        x.permute(0, 3, 1, 2).float(), (1, 1, 1, 1), mode="replicate"
    )[0, 0].byte()
    possible = [padded[i : i + 4, j : j + 5] for i in range(3) for j in range(3)]
    possible += [window.flip(1) for window in possible]

    seen = jittered(x.repeat(400, 1, 1, 1), 1, mirror=True)[..., 0]
    places = [[torch.equal(image, window) for window in possible].index(True) for image in seen]
    assert len(set(places)) == len(possible)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VAE(GREY, **SMALL),
        lambda: HVAE(GREY, features=4, latents=(3, 2), hidden=8),
        lambda: autoencoder(GREY),
    ],
)
def test_classifier_starts_from_any_encoder(make):
    """The whole encoder of a VAE, HVAE or autoencoder moves into a classifier, and only it."""
    other, model = make(), classifier(GREY)
    names = [name for name in model.state_dict() if name.startswith("encoder.")]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()

    assert sorted(start_from(model, other.state_dict())) == sorted(names)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name] if name in names else before[name])


def test_what_fits_nothing_is_refused():
    """Starting from a model without an encoder is an error, not a start from scratch."""
    with pytest.raises(TrainingError, match="same encoder"):
        start_from(classifier(GREY), GatedPixelCNN(GREY, features=4).state_dict())


@pytest.mark.parametrize("make", [autoencoder, classifier])
def test_graph_says_what_torch_says(make):
    """onnxruntime gives torch's answer for any number of images."""
    model, x = make(GREY).eval(), images(GREY, 20).numpy()
    graph = to_onnx(model)

    check_parity(model, graph, x)
    assert {"embedding", "statistics"} <= set(Session(graph, device="cpu").outputs)
