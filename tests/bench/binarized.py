"""Nats of a density of two levels on dynamically binarized images, the field's usual measure.

    python tests/bench/binarized.py [BUNDLE] [--data ../shared/data] [--draws 3]

Each value of the 10,000 test images of MNIST is drawn anew, white with the probability that it is
grey. A bundle trained with `[train] dither = true` has learned from such draws. The bits/dim in
its card are of images at a threshold, as it scores them, and are fewer.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from anomalyd.detect.bundle import read_bundle
from anomalyd.detect.golden import open_session
from anomalyd.sources import open_source
from anomalyd.train.data import dithered

ROOT = Path(__file__).parents[2]


def nats(path: Path, data: Path, draws: int) -> list[float]:
    """Mean -log p(x) of the test images, for each of some draws of them."""
    bundle = read_bundle(path)
    session, shape = open_session(bundle, device="cpu"), bundle.manifest.image
    pixels = np.stack([item.payload for item in open_source(str(data / "mnist"), split="test")])
    pixels = pixels.reshape(-1, shape.height, shape.width, 1)
    found = []
    for seed in range(draws):
        raw = session.run(dithered(pixels, shape.levels, [seed]))
        found.append(-float(raw.log_likelihood[:, 0].mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, default=ROOT / "trained" / "mnist-binary")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--draws", type=int, default=3)
    asked = parser.parse_args()
    found = nats(asked.bundle, asked.data, asked.draws)
    bits = np.mean(found) / (28 * 28 * math.log(2))
    each = ", ".join(f"{value:.2f}" for value in found)
    print(f"{asked.bundle.name}: {np.mean(found):.2f} nats ({each}), {bits:.4f} bits/dim")


if __name__ == "__main__":
    main()
