"""What an encoder's codes add to the statistics: the table of docs/scores.md.

    python tests/bench/codes.py [BUNDLE...] [--data ../shared/data]    default: both VAEs

States alone, codes alone, and ways of joining them, on the development sets: AUROC and the share
caught at alpha 0.01, 300 images a set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from outlier_sets import DATA, images_of, names, outlier_set

from anomalyd.detect.conformal import p_table, p_values
from anomalyd.detect.detector import Detector
from anomalyd.detect.measures import auroc
from anomalyd.detect.statistics import Fit, _columns, _directions, make_score
from anomalyd.images import content_hash
from anomalyd.sources import open_source

TRAINED = Path(__file__).parents[2] / "trained"
ALPHA, IMAGES, NORMALS, RANKED = 0.01, 300, 1_500, 3_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    asked = parser.parse_args()
    for path in asked.bundles or [TRAINED / "fashion-mnist-vae", TRAINED / "mnist-vae"]:
        table(path, asked.data)


def table(path: Path, data: Path) -> None:
    """Print one bundle's rows and their means."""
    detector = Detector.load(path)
    normal = path.name.rsplit("-", 1)[0]
    shape = (28, 28, 1)
    sets = {
        name: outlier_set(name, shape, IMAGES, data=data, normal=normal) for name in names(normal)
    }
    usual = images_of(normal, shape, NORMALS, np.random.default_rng(0), data)
    held = calibration_images(detector, data / normal)
    raws = {name: detector.session.run(images) for name, images in sets.items()}
    normals, ranked = detector.session.run(usual), detector.session.run(held)
    found = {}
    for way, score in ways(detector).items():
        at = [score(raw) for raw in (ranked, normals)]
        order, ranks = np.sort(at[0]), p_table(len(at[0]))
        found[way] = {
            name: (
                auroc(at[1], own := score(raw)),
                float((p_values(own, order, ranks) <= ALPHA).mean()),
            )
            for name, raw in raws.items()
        }
    print(f"| {path.name} | {' | '.join(found)} |")
    for name in sets:
        print(f"| {name} | {' | '.join(cell(each[name]) for each in found.values())} |")
    means = [np.mean(list(each.values()), axis=0) for each in found.values()]
    print(f"| mean of {len(sets)} sets | {' | '.join(map(cell, means))} |\n")


def cell(pair) -> str:
    return f"{pair[0]:.4f}, {pair[1]:.3f}"


def ways(detector: Detector):
    """Name -> from raw scores to a score; a and b are read off the shipped score's own parts."""
    fit = detector.calibration.fit
    alone = make_score("density_of_states", Fit(fit.nll, fit.statistics))
    parts = make_score("nearest_normals", fit)
    normals = parts._normals  # its two halves

    def halves(raw):
        rows = parts._compared(_columns(detector.nll(raw), raw.statistics))
        return normals._states(rows), normals._codes(_directions(raw.embedding))

    return {
        "states alone": lambda raw: alone(detector.nll(raw), raw.statistics),
        "codes alone": lambda raw: halves(raw)[1],
        "sum": lambda raw: sum(halves(raw)),
        "largest": lambda raw: np.maximum(*halves(raw)),
        "log(exp a + exp b)": lambda raw: np.logaddexp(*halves(raw)),
    }


def calibration_images(detector: Detector, data: Path) -> np.ndarray:
    """Calibration images of the bundle, found again by their hashes."""
    known = set(detector.calibration.calibration_hashes.tolist())
    images = []
    for item in open_source(data, split="train"):
        image = np.asarray(item.payload).reshape(28, 28, 1)
        if content_hash(image) in known:
            images.append(image)
        if len(images) == RANKED:
            break
    return np.stack(images)


if __name__ == "__main__":
    main()
