"""Samplers: three ways to one image, the right law, completions, and clear refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny import tiny_bundle, tiny_manifest

from anomalyd.density.base import Density, ImageShape
from anomalyd.density.gated_pixelcnn import GatedPixelCNN
from anomalyd.density.multiscale import Multiscale
from anomalyd.density.pixelcnn import PixelCNN
from anomalyd.density.pixelcnnpp import PixelCNNPP
from anomalyd.density.pixelrnn import DiagonalBiLSTM, RowLSTM
from anomalyd.detect import sample
from anomalyd.detect.sample import Sampler, grid
from anomalyd.errors import BundleError, UsageError
from anomalyd.images import ImageSpec
from anomalyd.train.export import to_sampler, to_steps

SQUARE, COLOUR = ImageShape(2, 2, 1, levels=4), ImageShape(6, 5, 3, levels=16)
DRAWS = 100_000


def far_from_uniform(made: Density) -> Density:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def density(shape: ImageShape, classes: int) -> Density:
    torch.manual_seed(0)
    return far_from_uniform(GatedPixelCNN(shape, classes, features=8, dilations=(1, 2)))


def sampler(made: Density, classes: list[str] | None) -> Sampler:
    shape = made.shape
    files = {"sampler.onnx": to_sampler(made), **to_steps(made)}
    manifest = tiny_manifest(
        image=ImageSpec(shape.height, shape.width, shape.channels, shape.levels),
        classes=classes,
        priors=None if classes is None else [1 / len(classes)] * len(classes),
    )
    return Sampler(manifest, files, "drawn", device="cpu", threads=1)


@pytest.fixture(scope="module")
def square() -> Sampler:
    """p(x|y) of 2x2 images of four levels, two classes."""
    return sampler(density(SQUARE, 2), ["cat", "dog"])


@pytest.fixture(scope="module")
def colour() -> Sampler:
    """p(x) of 6x5 RGB images of sixteen levels."""
    return sampler(density(COLOUR, 0), None)


@pytest.fixture(scope="module")
def read_out() -> Sampler:
    """The same, with the levels of the nearest pixels in the readout."""
    torch.manual_seed(0)
    options = {"features": 8, "dilations": (1, 2), "readout": 9, "nearby": 3}
    return sampler(far_from_uniform(GatedPixelCNN(COLOUR, **options)), None)


@pytest.fixture(scope="module")
def halved() -> Sampler:
    """p(x|y) of 6x5 RGB images at three resolutions, whose sides are odd on the way down."""
    torch.manual_seed(0)
    made = PixelCNNPP(COLOUR, 2, features=(4, 6, 8), blocks=(1, 0, 2), components=2)
    return sampler(far_from_uniform(made), ["cat", "dog"])


@pytest.fixture(scope="module")
def masked() -> Sampler:
    torch.manual_seed(0)
    return sampler(far_from_uniform(PixelCNN(COLOUR, features=8, blocks=2)), None)


@pytest.fixture(scope="module")
def rows() -> Sampler:
    torch.manual_seed(0)
    return sampler(far_from_uniform(RowLSTM(COLOUR, features=4, layers=2)), None)


@pytest.fixture(scope="module")
def diagonals() -> Sampler:
    torch.manual_seed(0)
    return sampler(far_from_uniform(DiagonalBiLSTM(COLOUR, features=4, layers=2)), None)


@pytest.mark.parametrize(
    ("label", "method"), [("cat", "loop"), ("dog", "loop"), ("cat", "jacobi"), ("dog", "cached")]
)
def test_samples_follow_the_enumerated_distribution(square, label, method):
    """100,000 draws of one class fit the exact probabilities of all 256 images (chi-square)."""
    every = np.array(list(itertools.product([0, 64, 128, 192], repeat=4)), np.uint8)
    made = density(SQUARE, 2)
    with torch.no_grad():
        log_p = made.log_prob(torch.from_numpy(every.reshape(-1, 2, 2, 1))).double()
    exact = log_p[:, ["cat", "dog"].index(label)].exp().numpy()
    drawn = square.draw(DRAWS, label=label, seed=1, method=method).images.astype(np.int64)
    index = (drawn.reshape(-1, 4) * 4 // 256) @ [64, 16, 4, 1]
    counts = np.bincount(index, minlength=256)

    likely = exact * DRAWS >= 5  # below that the approximation does not hold: pooled
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(exact[likely], exact[~likely].sum()) * DRAWS
    kept = expected > 0
    scaled = expected[kept] * observed.sum() / expected[kept].sum()
    assert chisquare(observed[kept], scaled).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    "which", ["square", "colour", "read_out", "halved", "masked", "rows", "diagonals"]
)
def test_three_methods_draw_the_same_images(which, temperature, request):
    """Loop and fixed-point iteration agree bit for bit; the cached sampler up to near ties."""
    made = request.getfixturevalue(which)
    options = {"seed": 5, "temperature": temperature}
    loop = made.draw(32, method="loop", **options)
    jacobi = made.draw(32, method="jacobi", **options)
    cached = made.draw(32, method="cached", **options)

    assert np.array_equal(loop.images, jacobi.images)
    assert loop.labels == jacobi.labels == cached.labels
    different = (loop.images != cached.images).any(axis=(1, 2, 3)).sum()
    assert different <= cached.near_ties
    assert loop.runs == made.steps
    assert jacobi.runs <= made.steps + 1
    assert cached.runs == 0


@pytest.mark.parametrize(
    "made",
    [
        PixelCNNPP(ImageShape(4, 3, 1, levels=8), features=(4, 6), blocks=(1, 0), components=2),
        Multiscale(ImageShape(5, 3, 3, levels=8), features=4, layers=1, pixel="hierarchical"),
    ],
    ids=["pixelcnn++", "multiscale"],
)
def test_fixed_point_is_the_image_of_the_loop_in_any_order(made):
    """Halved resolutions, or groups drawn at once: the graph keeps the order that it states."""
    drawing = sampler(far_from_uniform(made), None)
    loop, jacobi = (drawing.draw(16, method=method, seed=2) for method in ("loop", "jacobi"))

    assert np.array_equal(loop.images, jacobi.images)
    assert loop.runs == drawing.steps
    assert jacobi.runs <= drawing.steps + 1
    assert len(np.unique(loop.images, axis=0)) == 16


@pytest.mark.parametrize("method", ["loop", "jacobi", "cached"])
def test_many_images_are_drawn_some_at_a_time(square, method, monkeypatch):
    """The same images and classes as at once, in memory for a few; progress tells of them all."""
    told = []
    whole = square.draw(10, seed=7, method=method)
    monkeypatch.setattr(sample, "AT_ONCE", 4 * 16)
    parts = square.draw(10, seed=7, method=method, progress=lambda *done: told.append(done))

    assert np.array_equal(parts.images, whole.images)
    assert parts.labels == whole.labels
    assert parts.near_ties == whole.near_ties
    assert told == sorted(told)
    assert told[-1] == (square.steps, square.steps)


def test_the_noise_of_a_seed_is_one_stream(square):
    """First that of all values, then that of the classes: samples of old seeds stay."""
    rng = np.random.default_rng(11)
    rng.random((40, 2, 2, 1))
    expected = rng.choice(2, 40, p=[0.5, 0.5])

    assert square.draw(40, seed=11).labels == [("cat", "dog")[y] for y in expected]


def test_one_seed_gives_one_set_of_images(square):
    """The seed decides the noise and nothing else does."""
    first, again, other = (square.draw(64, seed=seed).images for seed in (1, 1, 2))

    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_low_temperature_draws_the_most_probable_value(colour):
    """As T goes to 0 every value is its mode, so the noise no longer matters."""
    first, other = (colour.draw(4, seed=seed, temperature=1e-4).images for seed in (1, 2))

    assert np.array_equal(first, colour.draw(4, temperature=5e-324).images)
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(first, other)


@pytest.mark.parametrize("method", ["loop", "jacobi", "cached"])
def test_completion_keeps_the_top_and_draws_the_rest(colour, method):
    """The kept rows come back as they were, at the density's levels; the rest varies."""
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    drawn = colour.draw(8, complete=image, method=method, seed=3).images

    assert (drawn[:, :3] // 16 == image[:3] // 16).all()
    assert len(np.unique(drawn[:, 3:], axis=0)) == 8
    reference = colour.draw(8, complete=image, method="loop", seed=3).images
    assert np.array_equal(drawn, reference)


def test_classes_without_a_label_come_from_the_priors(square):
    """Without --label a sample is one of p(x): its class is drawn, too, and said."""
    labels = square.draw(400, seed=0).labels

    assert 120 < labels.count("cat") < 280
    assert set(labels) == {"cat", "dog"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": "cow"}, "no such class; there are cat, dog"),
        ({"temperature": 0.0}, "positive"),
        ({"method": "magic"}, "loop, jacobi, cached"),
        ({"complete": np.zeros((2, 2, 1), np.uint8), "keep": "left"}, "top-half"),
        ({"complete": np.zeros((3, 2, 1), np.uint8)}, "3x2x1 .* draws 2x2x1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_impossible_wishes_are_refused_in_one_line(square, options, words):
    """What cannot be drawn is a usage error that names the rule."""
    with pytest.raises(UsageError, match=words):
        square.draw(2, **options)
    with pytest.raises(UsageError, match="at least 1"):
        square.draw(0)


def test_label_of_an_unlabelled_bundle_is_refused(colour):
    """--label needs classes."""
    with pytest.raises(UsageError, match="trained without classes"):
        colour.draw(2, label="cat")


def test_bundle_without_a_sampler_says_so(tmp_path):
    """A density that was exported without one names the way to get one."""
    with pytest.raises(BundleError, match="no sampler"):
        Sampler.load(tiny_bundle(tmp_path))


def test_grid_enlarges_by_a_whole_factor():
    """Tiles stay sharp: every pixel becomes a square; the sheet is as square as it can be."""
    images = np.zeros((5, 28, 28, 1), np.uint8)
    images[:, 0, 0] = 255
    sheet = np.asarray(grid(images))

    assert sheet.shape == (2 * 116 + 4, 3 * 116 + 4, 3)
    assert (sheet[4:8, 4:8] == 255).all()
    assert (sheet[4:8, 8:12] == 0).all()
