"""Every statistic that was tried for the score, and what each gave alone and all gave together.

    python tests/bench/candidates.py [BUNDLE] [--limit 500]

Statistics are computed with torch from the weights of a bundle with companions, on development
sets only. The first table is the AUROC of each alone, as it is and two-sided (its distance from
the median of the fit split, in ranks), whichever is larger; the second that of ways to make one
score of those that ship, and of all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from outlier_sets import DATA, images_of, outlier_set

from anomalyd.density.base import Surprise
from anomalyd.density.companions import Companions
from anomalyd.density.summary import deviation, excess, excess_map
from anomalyd.detect.bundle import read_bundle
from anomalyd.detect.measures import auroc
from anomalyd.detect.statistics import DensityOfStates, Fit
from anomalyd.sources import open_source
from anomalyd.train.models import assemble
from anomalyd.train.recipe import parse_recipe
from anomalyd.train.splits import split
from anomalyd.train.weights import load_weights

Columns = dict[str, NDArray[np.float64]]
ROOT = Path(__file__).parents[2]
CORRUPTED = ("patch-4x4", "flip-vertical", "rotate-90", "contrast-half", "noise-fifth", "blur")
SHIPPED = (
    "nll",
    "nll_patch 4",
    "excess",
    "excess_patch 4",
    "deviation",
    "local nll",
    "local excess",
    "nll - local nll",
    "vae kl",
    "vae |mu|",
    "vae log sigma",
    "vae nll_patch 4",
    "vae reconstruction - local nll",
)


def of_autoregressive(surprise: Surprise, prefix: str) -> Columns:
    """Candidates from the map of a PixelCNN, each (N,)."""
    found = {
        "nll": surprise.nll.sum(dim=(1, 2)),
        "entropy along the image": surprise.mean.sum(dim=(1, 2)),
        "log variance": torch.log(surprise.variance.sum(dim=(1, 2)) + 1),
        "excess": excess(surprise),
        "deviation": deviation(excess_map(surprise)),
        "median of the nll map": surprise.nll.flatten(1).median(dim=1).values,
        "99th percentile of nll - mean": (surprise.nll - surprise.mean)
        .flatten(1)
        .quantile(0.99, dim=1),
    }
    for side in (2, 4, 7):
        pool = torch.nn.AvgPool2d(side, stride=1)
        off, spread = (pool(m[:, None]) for m in (surprise.nll - surprise.mean, surprise.variance))
        found[f"nll_patch {side}"] = pool(surprise.nll[:, None]).amax(dim=(1, 2, 3))
        found[f"excess_patch {side}"] = off.amax(dim=(1, 2, 3))
        found[f"excess_patch {side} / sd"] = (off * torch.rsqrt(spread + 0.1)).amax(dim=(1, 2, 3))
    return {f"{prefix}{name}": value.double().numpy() for name, value in found.items()}


@torch.no_grad()
def candidates(density: Companions, images: NDArray[np.uint8]) -> Columns:
    """Every candidate for N images, by name."""
    parts: dict[str, list[NDArray[np.float64]]] = {}
    for start in range(0, len(images), 32):
        x = torch.from_numpy(images[start : start + 32].copy())
        found: Columns = {}
        for prefix, part in (("", density.main), ("local ", density.local)):
            maps = part.surprises(x)
            found |= of_autoregressive(Surprise(*(m[:, 0] for m in maps)), prefix)
        vae = dict(zip(density.vae.statistics, density.vae(x).statistics.T.double(), strict=True))
        found |= {
            "vae reconstruction": vae["reconstruction"].numpy(),
            "vae kl": vae["kl"].numpy(),
            "vae -elbo": (vae["reconstruction"] + vae["kl"]).numpy(),
            "vae |mu|": vae["mu_norm"].numpy(),
            "vae log sigma": vae["log_sigma_mean"].numpy(),
            "vae nll_patch 4": vae["nll_patch"].numpy(),
        }
        found["nll - local nll"] = found["nll"] - found["local nll"]
        found["vae -elbo - nll"] = found["vae -elbo"] - found["nll"]
        found["vae reconstruction - local nll"] = found["vae reconstruction"] - found["local nll"]
        flipped = density.main.nll_maps(x.flip(2))[:, 0].sum(dim=(1, 2)).double().numpy()
        found["nll - nll of the mirror image"] = found["nll"] - flipped
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def combinations(fit: NDArray[np.float64]) -> dict[str, Callable[[NDArray[np.float64]], NDArray]]:
    """Ways to make one score of columns (N, S), fitted to the fit split's."""
    dose = DensityOfStates(Fit(fit[:, 0], fit[:, 1:]))

    def ranked(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return dose._compared(x)

    normal = ranked(fit)
    mean = normal.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(normal.T))
    whiten = vectors / np.sqrt(values + 0.1)

    def nearest(x: NDArray[np.float64], to: NDArray[np.float64]) -> NDArray[np.float64]:
        squares = np.square(x).sum(1)[:, None] + np.square(to).sum(1) - 2 * x @ to.T
        return np.sqrt(np.maximum(np.partition(squares, 4, axis=1)[:, :5], 0)).mean(axis=1)

    return {
        "nearest neighbours of ranks (ships)": lambda x: dose(x[:, 0], x[:, 1:]),
        "the same, whitened": lambda x: nearest(
            (ranked(x) - mean) @ whiten, (normal - mean) @ whiten
        ),
        "Gaussian copula (Mahalanobis)": lambda x: np.square((ranked(x) - mean) @ whiten).sum(1),
        "largest absolute value": lambda x: np.abs(ranked(x)).max(axis=1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "bundle", nargs="?", type=Path, default=ROOT / "trained/fashion-mnist-pixelcnn"
    )
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--data", type=Path, default=DATA)
    given = parser.parse_args()
    bundle = read_bundle(given.bundle)
    recipe = parse_recipe(bundle.read("recipe.toml").decode(), "recipe.toml")
    density = assemble(recipe, bundle.manifest.image).eval()
    load_weights(density, bundle.read("weights.safetensors"), str(given.bundle))
    base = bundle.manifest.name.removesuffix("-pixelcnn")
    source = open_source(given.data / base, split="train")
    train = np.stack([item.payload for item in source]).reshape(-1, 28, 28, 1)
    from anomalyd.images import content_hash

    hashes = np.array([content_hash(image) for image in train], np.uint64)
    rows = split(hashes, [None] * len(train), seed=recipe.train.seed).fit[: 3 * given.limit]
    fit = candidates(density, train[rows])
    shape, rng = bundle.manifest.image, np.random.default_rng(0)
    normals = images_of(base, (shape.height, shape.width, 1), given.limit, rng, given.data)
    test = candidates(density, normals)
    other = "mnist" if base == "fashion-mnist" else "fashion-mnist"
    sets = {
        name: candidates(
            density,
            outlier_set(name, n=given.limit, seed=0, data=given.data, normal=base),
        )
        for name in (other, "handwriting", "constant", *CORRUPTED)
    }
    heading = f"| {bundle.manifest.name} | {' | '.join(sets)} |\n|---|{'---|' * len(sets)}"
    print(heading)
    for name in fit:
        middle = np.median(fit[name])
        cells = [
            max(
                auroc(test[name], found[name]),
                auroc(np.abs(test[name] - middle), np.abs(found[name] - middle)),
            )
            for found in sets.values()
        ]
        shown = f"**{name}**" if name in SHIPPED else name
        print(f"| {shown} | {' | '.join(f'{cell:.3f}' for cell in cells)} |", flush=True)
    for what, chosen in (("those in bold", SHIPPED), ("all", tuple(fit))):
        print(f"\n{heading}")
        columns = [np.column_stack([c[name] for name in chosen]) for c in (fit, test)]
        for name, score in combinations(columns[0]).items():
            normal = score(columns[1])
            cells = [
                auroc(normal, score(np.column_stack([found[name] for name in chosen])))
                for found in sets.values()
            ]
            print(f"| {what}: {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")


if __name__ == "__main__":
    main()
