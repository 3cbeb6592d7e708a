"""Exact log p(x) of tiny densities with one to three latent dimensions."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from anomalyd.density.variational import Variational


@torch.no_grad()
def exact_log_p(
    density: Variational, images: Tensor, label: int | None = None, nodes: int | None = None
) -> Tensor:
    """log of the integral of p(x|z) over the noise that z is drawn by: (N,) float64, nats."""
    axis = torch.linspace(
        -7, 7, nodes or {1: 1401, 2: 141, 3: 41}[density.latent], dtype=torch.float64
    )
    noise = torch.cartesian_prod(*[axis] * density.latent).reshape(-1, density.latent)
    labels = None if label is None else torch.full((len(noise),), label)
    any_image = images[:1].expand(len(noise), -1, -1, -1)  # grey: no value depends on another
    tables = density.log_probs(any_image, labels, noise.float()).double()
    log_prior = -(noise.square().sum(dim=1) + density.latent * math.log(2 * math.pi)) / 2
    log_cell = density.latent * math.log(axis[1] - axis[0])
    values = functional.one_hot(density.quantise(images).long(), tables.shape[4])
    given_noise = values.flatten(1).double() @ tables.flatten(1).T
    return torch.logsumexp(given_noise + log_prior, dim=1) + log_cell


@torch.no_grad()
def bounds_over_banks(density: Variational, images: Tensor, samples: int, banks: int) -> Tensor:
    """The bound under many noise banks of `samples` vectors each: (banks, N, K) float64."""
    generator = torch.Generator().manual_seed(2)
    many = images.repeat(banks, 1, 1, 1)
    noise = torch.randn(samples, len(many), 1, density.latent, generator=generator)
    return density.bounds(many, noise).unflatten(0, (banks, len(images)))


def check_bound(density: Variational, images: Tensor, samples: tuple[int, ...]) -> None:
    """Hold the mean over 10,000 banks below log p(x), and let it rise with `samples`."""
    labels = range(density.classes) if density.classes else [None]
    exact = torch.stack([exact_log_p(density, images, label) for label in labels], dim=1)
    means = []
    for count in samples:
        bounds = bounds_over_banks(density, images, count, 10_000)
        error = bounds.std(dim=0) / math.sqrt(len(bounds))
        assert (bounds.mean(dim=0) <= exact + 3 * error).all()
        means.append(bounds.mean(dim=0))
    for fewer, more in itertools.pairwise(means):
        assert (more > fewer).all()
