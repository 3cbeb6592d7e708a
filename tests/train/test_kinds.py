"""Training with classes and without a density: what each kind of bundle can do, and cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalyd.cli import main
from anomalyd.detect.bundle import read_bundle
from anomalyd.detect.detector import Detector
from anomalyd.detect.golden import open_session
from anomalyd.errors import UsageError
from anomalyd.sources import open_source
from anomalyd.train.commands import train
from anomalyd.train.weights import unpack_weights

TRAIN = "[train]\nbatch_size = 32\ncheckpoint_seconds = 0.0\nepochs = 2.0\n"
OPTIONS = {
    "vae": "features = 4\nlatent = 4\noutputs = 4\npixel = 'hierarchical'\n",
    "classifier": "features = 4\nlatent = 4\nhidden = 8\n",
    "autoencoder": "features = 4\nlatent = 4\n",
}


def trained(model: str, data: Path, folder: Path, more: str = "", **options) -> Path:
    recipe, out = folder / f"{model}.toml", folder / f"my-{model}"
    recipe.write_text(f'model = "{model}"\n[density]\n{OPTIONS[model]}{TRAIN}{more}')
    assert train(data=str(data), model=None, out=out, recipe=recipe, **options) == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def conditional(fixture_data, folder) -> Path:
    """p(x|y) of the fixture's clothes."""
    return trained("vae", fixture_data / "fashion-mnist", folder, labels=True)


@pytest.fixture(scope="module")
def classifier(fixture_data, folder, conditional) -> Path:
    """p(y|x), on the encoder of the VAE as it is."""
    data, frozen = fixture_data / "fashion-mnist", 'frozen = ["encoder"]\n'
    return trained("classifier", data, folder, frozen, labels=True, init=conditional)


@pytest.fixture(scope="module")
def autoencoder(fixture_data, folder) -> Path:
    return trained("autoencoder", fixture_data / "fashion-mnist", folder)


def test_labels_give_a_density_for_each_class(conditional, fixture_data):
    """The graph returns (N, K); classes and counted priors are in the manifest; p(x) is scored."""
    detector = Detector.load(conditional, threads=1)
    manifest = detector.manifest
    items = list(open_source(fixture_data / "fashion-mnist", split="test"))
    raw = detector.session.run(np.stack([item.payload for item in items[:5]])[..., None])

    assert manifest.classes == [str(digit) for digit in range(10)]
    assert sum(manifest.priors) == pytest.approx(1)
    assert raw.log_likelihood.shape == (5, 10)
    marginal = np.logaddexp.reduce(raw.log_likelihood + np.log(manifest.priors), axis=1)
    np.testing.assert_allclose(-detector.nll(raw), marginal, rtol=1e-9)


def test_sample_draws_a_class_from_the_command_line(conditional, tmp_path, capsys):
    """`anomalyd sample --label` writes a PNG of that class and says so."""
    out = tmp_path / "boots.png"
    code = main(["sample", str(conditional), "-n", "4", "--label", "9", "--output", str(out)])

    assert code == 0
    assert "4 images of 9" in capsys.readouterr().err
    with Image.open(out) as picture:
        assert picture.size == (2 * 116 + 4, 2 * 116 + 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--label", "boot"], "no such class"),
        (["--complete", "tests/fixtures/images/boot.png"], "top down"),
        (["--keep", "top-half"], "add --complete"),
        (["--seed", "-1"], "range"),
        (["-n", "0"], "range"),
        (["-n", "1000000"], "range"),
        (["--output", "x.jpg"], "written as .png"),
    ],
)
def test_impossible_samples_end_in_one_line(conditional, arguments, words, capsys):
    """A wish that this density cannot fulfil is a usage error."""
    assert main(["sample", str(conditional), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_classifier_starts_from_an_encoder_and_keeps_its_classes(classifier):
    """It is no density; its graph gives log p(y|x), and its card the accuracy."""
    content = read_bundle(classifier)
    raw = open_session(content, threads=1).run(content.golden.images)

    assert content.manifest.kind == "classifier"
    assert raw.log_posterior.shape == (4, 10)
    assert "accuracy" in content.read("CARD.md").decode()


def test_init_copies_the_encoder(classifier, conditional):
    """With it frozen, the trained classifier still has the VAE's kernels."""
    ours, theirs = (
        unpack_weights(read_bundle(path).read("weights.safetensors"), "")
        for path in (classifier, conditional)
    )

    shared = [name for name in ours if name.startswith("encoder.convs")]
    assert shared
    assert all(torch.allclose(ours[name], theirs[name]) for name in shared)


def test_autoencoder_embeds_and_has_no_density(autoencoder, fixture_data, tmp_path, capsys):
    """`embed` writes its codes; sampling from it and scoring with it are refused in one line."""
    out = tmp_path / "features.csv"
    data = f"{fixture_data / 'fashion-mnist'}:test"

    assert main(["embed", str(autoencoder), data, "--output", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 201
    capsys.readouterr()
    assert main(["sample", str(autoencoder)]) == 1
    assert "no density to draw from" in capsys.readouterr().err
    assert main(["score", str(autoencoder), "tests/fixtures/images/boot.png"]) == 1
    assert "no density" in capsys.readouterr().err


def test_kinds_verify(conditional, classifier, autoencoder, capsys):
    """`bundle verify` checks all three."""
    assert main(["bundle", "verify", str(conditional), str(classifier), str(autoencoder)]) == 0
    assert capsys.readouterr().out.count("good") == 3


def test_labels_of_a_model_without_classes_are_refused(fixture_data, tmp_path):
    """A density that takes no classes says so before any image is read."""
    data = str(fixture_data / "fashion-mnist")
    with pytest.raises(UsageError, match="takes no classes"):
        train(data=data, model="row-lstm", out=tmp_path / "x", labels=True)


def test_classifier_without_labels_is_refused(fixture_data, tmp_path):
    """A classifier needs classes, and its error names the flag."""
    with pytest.raises(UsageError, match="--labels"):
        train(data=str(fixture_data / "fashion-mnist"), model="classifier", out=tmp_path / "x")
