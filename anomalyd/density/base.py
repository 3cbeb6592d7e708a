"""What every model keeps to, and what every density: a log-likelihood, or a bound that says so."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalyd.density.jitter import jittered
from anomalyd.density.summary import deviation, excess, excess_map, largest_patch, total

__all__ = [
    "Autoregressive",
    "Bayes",
    "Density",
    "ImageShape",
    "Model",
    "PixelLikelihood",
    "Scores",
    "Step",
    "Surprise",
]


class ImageShape(NamedTuple):
    """Height, width and channels of an image, and the number of levels a value is quantised to."""

    height: int
    width: int
    channels: int = 1
    levels: int = 256

    @property
    def dims(self) -> int:
        """Dimensions H * W * C, by which bits per dimension divide."""
        return self.height * self.width * self.channels


class Scores(NamedTuple):
    """What one forward pass says of N images.

    Attributes:
        log_likelihood: (N, K) float32, nats; K classes, or 1.
        statistics: (N, S) float32, in the order of `Density.statistics`.
        nll_map: (N, H, W) float32, nats: minus the log-likelihood, pixel by pixel; with classes
            that of the likeliest one.
        embedding: (N, E) float32 features, where the density has an encoder.
        excess_map: (N, H, W) float32, standard deviations: what of `nll_map` was not expected.
    """

    log_likelihood: Tensor
    statistics: Tensor
    nll_map: Tensor
    embedding: Tensor | None = None
    excess_map: Tensor | None = None


class Model(nn.Module):
    """What `anomalyd train` can fit to images of one shape; subclasses set `kind` and `loss`.

    It does not decode, resize or normalise images: those are uint8 (N, H, W, C) as decoded.
    Its `forward` returns a NamedTuple whose fields are the outputs of the exported graph.

    Attributes:
        shape: the image shape.
        classes: K where labels are given, 0 without.
        kind: `density`, `classifier` or `autoencoder`.
        unit: what `loss` is counted in.
        statistics: the names of the columns of the output `statistics`.
        units: the unit of each statistic.
        edges: the submodules that embed the input or read out the distribution; optimisers that
            treat hidden kernels differently leave these alone.
    """

    kind: str = "density"
    unit: str = "bits/dim"
    statistics: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    edges: tuple[str, ...] = ("pixel",)

    def __init__(self, shape: ImageShape, classes: int = 0) -> None:
        super().__init__()
        if shape.height < 1 or shape.width < 1 or shape.channels not in (1, 3):
            raise ValueError(f"an image is at least 1x1 with 1 or 3 channels, not {shape}")
        if not 2 <= shape.levels <= 256:
            raise ValueError(f"levels must lie in 2..256, not {shape.levels}")
        self.shape = shape
        self.classes = classes

    def loss(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what training minimises, a mean over images, in `unit`.

        Args:
            images: uint8 (N, H, W, C).
            labels: int64 (N,), the classes; None where there are none.
        """
        raise NotImplementedError

    def losses(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what validation averages, without noise: (N,) in `unit`."""
        raise NotImplementedError

    @property
    def loss_name(self) -> str:
        """What `loss` is, for those who watch it: its unit, and what else is added up in it."""
        return self.unit

    def is_edge(self, name: str) -> bool:
        """Tell whether the parameter `name` embeds the input or reads out the distribution."""
        return name.split(".")[0] in self.edges

    def quantise(self, images: Tensor) -> Tensor:
        """Map bytes to levels, floor(x * levels / 256): int64 in [0, levels)."""
        if self.shape.levels == 256:
            return images.long()
        return torch.div(images.long() * self.shape.levels, 256, rounding_mode="floor")

    def centred(self, values: Tensor) -> Tensor:
        """Map levels to float32 in [-1, 1], channels first: (N, C, H, W)."""
        scaled = values.float() * (2 / (self.shape.levels - 1)) - 1
        return scaled.permute(0, 3, 1, 2)


class Bayes(NamedTuple):
    """How training weighs p(y|x) by Bayes' rule beside p(x|y).

    A good density classifies badly, for a class is worth a few nats of the thousand that an image
    has. The weight buys accuracy for likelihood.

    Attributes:
        weight: w of -log p(y|x), both in nats.
        shift: pixels by which the images of that term are moved at random, at most, and
        mirror: whether each is mirrored with probability 1/2; the density never sees these.
        log_priors: log p(y) of each class; None where they are equal.
    """

    weight: float
    shift: int = 0
    mirror: bool = False
    log_priors: tuple[float, ...] | None = None


class Density(Model):
    """p(x), or p(x|y) for each of K classes: an exact log-likelihood, or a bound that says so.

    Attributes:
        likelihood: `exact`, `elbo` or `iwae-K`: what the log-likelihood is.
        latent: dimensions of the Gaussian noise that a sample starts from; 0 without.
        bayes: how training weighs the posterior; None leaves it to the likelihood alone.
        draws: whether it can draw images.
    """

    likelihood: str = "exact"
    latent: int = 0
    bayes: Bayes | None = None
    draws: bool = True

    def forward(self, images: Tensor) -> Scores:
        """Score `images`, uint8 (N, H, W, C), in one pass, under every class."""
        raise NotImplementedError

    def check_labels(self, labels: Tensor | None) -> None:
        """Refuse to go on without labels where there are classes: no p(x|y) without a y.

        Raises:
            ValueError: there are classes and no labels.
        """
        if self.classes and labels is None:
            raise ValueError(f"p(x|y) of {self.classes} classes needs `labels`, int64, not None")

    def log_prob(self, images: Tensor) -> Tensor:
        """Return log p(x), or its lower bound, in nats: (N,) float32; with classes (N, K)."""
        log_likelihood = self(images).log_likelihood
        return log_likelihood if self.classes else log_likelihood[:, 0]

    @property
    def loss_name(self) -> str:
        """The unit, and that labels are weighed in where they are."""
        return self.unit if self.bayes is None else f"{self.unit} and weighed labels"

    def loss(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean of -log p(x), or of -log p(x|y) - w log p(y|x), in bits per dimension.

        References:
            Hybrids of Generative and Discriminative Methods for Machine Learning (Lasserre,
            Bishop, Minka, 2006).
        """
        own = self.noisy_losses(images, labels).mean()
        if labels is None or self.bayes is None:
            return own
        moved = jittered(images, self.bayes.shift, mirror=self.bayes.mirror)
        joint = self.class_evidence(moved).float()
        if self.bayes.log_priors is not None:
            joint = joint + torch.tensor(self.bayes.log_priors, device=joint.device)
        return own + self.bits_per_dim(-self.bayes.weight * F.cross_entropy(joint, labels))

    def noisy_losses(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return `losses` as training sees them, under fresh noise where there is any: (N,)."""
        return self.losses(images, labels)

    def class_evidence(self, images: Tensor) -> Tensor:
        """Return log p(x|y), up to a term that all classes share, in nats: (N, K)."""
        return self.log_prob(images)

    def losses(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return -log p(x), or -log p(x|y), of each image in bits per dimension: (N,).

        Raises:
            ValueError: there are classes and no labels.
        """
        self.check_labels(labels)
        log_p = self.log_prob(images)
        if labels is not None:
            log_p = log_p.gather(1, labels.unsqueeze(1))[:, 0]
        return self.bits_per_dim(log_p)

    def bits_per_dim(self, log_p: Tensor) -> Tensor:
        """Turn log p in nats into bits per dimension, -log2 p / (H W C)."""
        return -log_p / (self.shape.dims * math.log(2))

    def log_probs(
        self, images: Tensor, labels: Tensor | None = None, latent: Tensor | None = None
    ) -> Tensor:
        """Return log p of every level of every value given those drawn before it, in nats.

        Args:
            images: uint8 (N, H, W, C); a value is read only by those later in `order`.
            labels: int64 (N,), the class of each, where the density has classes.
            latent: float32 (N, `self.latent`) standard normal noise, where it has any.

        Returns:
            (N, H, W, C, levels) float32, normalised over the last axis.

        Raises:
            ValueError: there are classes and no labels.
        """
        raise NotImplementedError

    def one_by_one(self) -> tuple[Step, Step] | None:
        """Return the modules of the cached sampler, a row's and a pixel's; None without one.

        See `stepwise` for what they take and give.
        """
        return None

    @property
    def order(self) -> Tensor:
        """The step at which each value can be drawn: int64 (H, W, C), from 0 without gaps.

        Values of one step are independent given those of earlier steps. Here: row by row, in a
        row from left to right, in a pixel red, green, blue.
        """
        return torch.arange(self.shape.dims).reshape(self.shape[:3])


class Step(nn.Module):
    """A part of a cached sampler, with a state of float32 (N, `state_size`), zero at first.

    Attributes:
        labelled: whether it reads the class, where the density has classes.
    """

    state_size: int
    labelled = False


class Surprise(NamedTuple):
    """-log p of a value, and what it was expected to be before the value was seen.

    Where an image is merely complex both are large, where it is strange only one is. Under the
    density itself `nll - mean` averages to zero pixel by pixel, whatever the image before it.

    Attributes:
        nll: -log p of each pixel, nats.
        mean: the mean of -log p under p, its entropy, nats; where a value is drawn in parts, such
            as band and level, of each part given those before it.
        variance: the variance of -log p under p, nats squared; likewise.
    """

    nll: Tensor
    mean: Tensor
    variance: Tensor


class PixelLikelihood(nn.Module):
    """The distribution of one pixel given its context, normalised exactly over the levels."""

    def forward(self, context: Tensor, values: Tensor, inputs: Tensor) -> Tensor:
        """Return log p of each pixel in nats, (N, H, W).

        Args:
            context: (N, F, H, W), computed from pixels before this one.
            values: int64 (N, H, W, C) levels.
            inputs: (N, C, H, W), the same values in [-1, 1].
        """
        raise NotImplementedError

    def surprise(self, context: Tensor, values: Tensor, inputs: Tensor) -> Surprise:
        """Return -log p of each pixel with its mean and variance, each (N, H, W); as `forward`."""
        raise NotImplementedError

    def log_probs(self, context: Tensor, inputs: Tensor) -> Tensor:
        """Return log p of every level of every channel given the channels before it, in nats.

        Returns:
            (N, H, W, C, levels).
        """
        raise NotImplementedError


class Autoregressive(Density):
    """log p(x) = sum_t log p(x_t | what comes before t): a context, and a pixel's distribution.

    Subclasses implement `context` and set `pixel`, a module of `likelihoods`.
    """

    pixel: PixelLikelihood
    statistics = ("nll_patch", "excess", "excess_patch", "deviation")
    units = ("nats", "1", "nats", "1")

    def context(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what each pixel's distribution depends on: (N, M, F, H, W).

        Args:
            inputs: (N, C, H, W) in [-1, 1].
            labels: int64 (N, M), the classes to condition on; None, and M = 1, without.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Scores:
        """Score `images`, uint8 (N, H, W, C), under every class."""
        labels = None
        if self.classes:
            every = torch.arange(self.classes, device=images.device)
            labels = every.expand(images.shape[0], self.classes)
        surprise = self.surprises(images, labels)
        log_likelihood = -total(surprise.nll)
        if self.classes:
            best = log_likelihood.argmax(dim=1).reshape(-1, 1, 1, 1)
            best = best.expand(-1, 1, *surprise.nll.shape[2:])
            surprise = Surprise(*(maps.gather(1, best) for maps in surprise))
        surprise = Surprise(*(maps[:, 0] for maps in surprise))
        relative = excess_map(surprise)
        statistics = [
            largest_patch(surprise.nll),
            excess(surprise),
            largest_patch(surprise.nll - surprise.mean),
            deviation(relative),
        ]
        return Scores(
            log_likelihood=log_likelihood,
            statistics=torch.stack(statistics, dim=1),
            nll_map=surprise.nll,
            excess_map=relative,
        )

    def nll_maps(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return -log p of each pixel under the M classes of `labels` (N, M): (N, M, H, W)."""
        given, shape = self._given(images, labels)
        return -self.pixel(*given).unflatten(0, shape)

    def surprises(self, images: Tensor, labels: Tensor | None = None) -> Surprise:
        """Return the same with its mean and variance, each (N, M, H, W)."""
        given, shape = self._given(images, labels)
        return Surprise(*(maps.unflatten(0, shape) for maps in self.pixel.surprise(*given)))

    def _given(
        self, images: Tensor, labels: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int]]:
        """Return context, levels and values of every image under every class, and (N, M)."""
        self.check_labels(labels)
        values = self.quantise(images)
        inputs = self.centred(values)
        context = self.context(inputs, labels)
        n, m = context.shape[:2]
        if m > 1:
            values = values.unsqueeze(1).expand(n, m, *values.shape[1:]).flatten(0, 1)
            inputs = inputs.unsqueeze(1).expand(n, m, *inputs.shape[1:]).flatten(0, 1)
        return (context.flatten(0, 1), values, inputs), (n, m)

    def losses(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return -log p of each image, under its own class only, in bits per dimension: (N,)."""
        maps = self.nll_maps(images, None if labels is None else labels.unsqueeze(1))
        return self.bits_per_dim(-total(maps[:, 0]))

    def log_probs(
        self, images: Tensor, labels: Tensor | None = None, latent: Tensor | None = None
    ) -> Tensor:
        """Return log p of every level of every value given those before it."""
        self.check_labels(labels)
        inputs = self.centred(self.quantise(images))
        context = self.context(inputs, None if labels is None else labels.unsqueeze(1))
        return self.pixel.log_probs(context[:, 0], inputs)
