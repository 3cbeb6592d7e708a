"""What doubt does for the images that fit no class: the table of docs/scores.md.

    python tests/bench/doubt.py [BUNDLE...] [--data ../shared/data] [--limit 600]

Doubt is what a score in a class grows by for each nat that another class is likelier by. For each
doubt, the share called novel at alpha 0.01 of the development sets, of all of them together, of
normal images (the test split) and of those of the class with the largest share.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from outlier_sets import DATA, names, outlier_set

from anomalyd.detect.detector import Detector
from anomalyd.detect.ranks import ranks_by_class
from anomalyd.detect.runtime import Raw
from anomalyd.images import content_hash
from anomalyd.sources import open_source

TRAINED = Path(__file__).parents[2] / "trained"
BUNDLES = ("fashion-mnist-bayes", "fashion-mnist-composed", "mnist-bayes")
DOUBTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
SHOWN = ("mnist", "fashion-mnist", "cifar10", "sklearn-digits", "handwriting", "patch-4x4")
ALPHA = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--limit", type=int, default=600, help="images a set")
    asked = parser.parse_args()
    for path in asked.bundles or [TRAINED / name for name in BUNDLES]:
        table(path, asked.data, asked.limit)


def table(path: Path, data: Path, limit: int) -> None:
    """Print one bundle's rows, one a doubt."""
    detector = Detector.load(path)
    normal = "fashion-mnist" if path.name.startswith("fashion") else "mnist"
    shape = (28, 28, 1)
    sets = {
        name: detector.run(outlier_set(name, shape, limit, data=data, normal=normal))
        for name in names(normal)
    }
    known = frozenset(detector.calibration.calibration_hashes.tolist())
    held = labelled(detector, data / normal, "train", known)
    usual = labelled(detector, data / normal, "test")
    shown = [name for name in SHOWN if name in sets]
    heading = [f"{path.name}, doubt", *shown, f"mean of {len(sets)} sets", "normal", "worst class"]
    print(f"| {' | '.join(heading)} |")
    print(f"|---{'|---:' * (len(shown) + 3)}|")
    for doubt in DOUBTS:
        found = ranks_by_class(
            detector.scores(held[0]),
            held[0].log_likelihood,
            held[1],
            classes=detector.classes,
            priors=detector.manifest.priors,
            temperature=detector.manifest.temperature,
            doubt=doubt,
        )
        manifest = replace(detector.manifest, doubt=doubt)
        calibration = replace(detector.calibration, **found)
        judge = Detector(
            replace(detector.bundle, manifest=manifest, calibration=calibration), detector.session
        )
        novel = {name: judge.columns(raw, ALPHA).outlier.mean() for name, raw in sets.items()}
        alarms = judge.columns(usual[0], ALPHA).outlier
        worst = max(alarms[usual[1] == y].mean() for y in range(len(detector.classes)))
        cells = [*(novel[name] for name in shown), np.mean(list(novel.values()))]
        figures = " | ".join(f"{cell:.3f}" for cell in cells)
        print(f"| {doubt:g} | {figures} | {alarms.mean():.4f} | {worst:.3f} |", flush=True)
    print()


def labelled(
    detector: Detector, data: Path, split: str, known: frozenset[int] | None = None
) -> tuple[Raw, np.ndarray]:
    """Raw scores and classes of a split's images, or of those with known hashes."""
    images, labels = [], []
    for item in open_source(data, split=split, labels=True):
        image = np.asarray(item.payload).reshape(28, 28, 1)
        if known is None or content_hash(image) in known:
            images.append(image)
            labels.append(detector.classes.index(item.label))
    return detector.session.run(np.stack(images)), np.array(labels)


if __name__ == "__main__":
    main()
