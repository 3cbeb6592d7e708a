"""Does an encoder that saw images without labels help where labels are few?

    python tests/bench/few_labels.py [--data ../shared/data/fashion-mnist]
                                     [--bundle trained/fashion-mnist-vae]

Two classifiers are trained on the same labelled images with the same settings, seed by seed; one
starts from random weights, the other from the encoder of the bundle. The settings were chosen on
images of the training split, held out; the test split is read once, at the end of each run.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anomalyd.density.base import ImageShape
from anomalyd.density.classifier import Classifier
from anomalyd.detect.bundle import read_bundle
from anomalyd.sources import open_source
from anomalyd.train.recipe import parse_recipe
from anomalyd.train.weights import start_from, unpack_weights

ROOT = Path(__file__).parents[2]
CLASSES = 10
SEEDS = 5
STEPS = {100: 200, 1_000: 500}
BATCH = 64
RATE = 5e-4
DECAY = 0.05


def labelled(data: str, split: str) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, H, W, C) and labels int64 (N,)."""
    items = list(open_source(data, split=split, labels=True))
    names = sorted({item.label for item in items})
    images = np.stack([item.payload for item in items])
    labels = np.array([names.index(item.label) for item in items])
    return torch.from_numpy(images.reshape(*images.shape[:3], -1)), torch.from_numpy(labels)


def draw(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` rows, as many of each class."""
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    of_class = [shuffled[labels[shuffled] == label] for label in range(CLASSES)]
    return torch.cat([rows[: count // CLASSES] for rows in of_class])


def train(model: Classifier, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """Train in place by AdamW, its rate falling along half a cosine."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        model.loss(images[rows], labels[rows]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose likeliest class is theirs."""
    model.eval()
    said = [model(part).log_posterior.argmax(dim=1) for part in images.split(500)]
    return (torch.cat(said) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(ROOT.parent / "shared/data/fashion-mnist"))
    parser.add_argument("--bundle", type=Path, default=ROOT / "trained/fashion-mnist-vae")
    given = parser.parse_args()
    bundle = read_bundle(given.bundle)
    recipe = parse_recipe(bundle.read("recipe.toml").decode(), "recipe.toml").density
    options = {key: recipe[key] for key in ("features", "latent") if key in recipe}
    learned = unpack_weights(bundle.read("weights.safetensors"), str(given.bundle))
    images, labels = labelled(given.data, "train")
    test_images, test_labels = labelled(given.data, "test")
    shape = ImageShape(*images.shape[1:])
    print(f"{given.bundle.name}; {SEEDS} seeds; accuracy on {len(test_labels):,} test images")
    print("\n| labels | start | accuracy | standard deviation |\n|---|---|---|---|")
    for count, steps in STEPS.items():
        for start in ("scratch", "encoder"):
            found = []
            for seed in range(SEEDS):
                torch.manual_seed(seed)
                model = Classifier(shape, CLASSES, **options)
                if start == "encoder":
                    start_from(model, learned)
                rows = draw(labels, count, seed)
                train(model, images[rows], labels[rows], steps, seed)
                found.append(accuracy(model, test_images, test_labels))
            print(f"| {count:,} | {start} | {np.mean(found):.4f} | {np.std(found, ddof=1):.4f} |")


if __name__ == "__main__":
    main()
