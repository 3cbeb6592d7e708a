"""The pictures of README and cards, from the bundles in trained/ and the committed fixture.

python tests/bench/figures.py
"""

from __future__ import annotations

import math
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from anomalyd.detect.bundle import find_bundles, read_bundle
from anomalyd.detect.detector import Detector, Verdict
from anomalyd.images import to_pixels

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "tests" / "fixtures" / "images"
SHOWN = ("shirt.png", "noisy-shirt.png")


def example(detector: Detector, out: Path) -> None:
    """A normal image and an outlier, each with its map in bits and its p-value."""
    figure, axes = plt.subplots(1, 4, figsize=(8, 2.5), layout="constrained")
    stacked = np.stack([to_pixels(IMAGES / name, detector.spec) for name in SHOWN])
    raw = detector.session.run(stacked, nll_map=True)
    verdicts = detector.judge(raw, detector.alpha(None))
    top = float(raw.nll_map.max() / np.log(2))
    for place, (name, verdict) in enumerate(zip(SHOWN, verdicts, strict=True)):
        picture, surprise = axes[2 * place], axes[2 * place + 1]
        picture.imshow(stacked[place, ..., 0], cmap="gray", vmin=0, vmax=255)
        picture.set_title(name, fontsize=9)
        shown = surprise.imshow(raw.nll_map[place] / np.log(2), cmap="inferno", vmin=0, vmax=top)
        surprise.set_title(f"p = {verdict.p_value:.4f}: {said(verdict)}", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes[3], label="bits", shrink=0.8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def said(verdict: Verdict) -> str:
    return "outlier" if verdict.outlier else "normal"


def histogram(detector: Detector, axis: Axes) -> None:
    """Calibration scores, and the line from which the default alpha flags."""
    scores, alpha = detector.calibration.scores, detector.alpha(None)
    threshold = detector.calibration.threshold(alpha)
    most = 2 * (np.quantile(scores, 0.99) if threshold is None else threshold)
    axis.hist(np.minimum(scores, most), bins=60, color="#4a7ba6")
    if threshold is not None:
        axis.axvline(threshold, color="#c0392b", label=f"outlier at alpha = {alpha:g}")
    axis.set_title(detector.manifest.name, fontsize=9)
    axis.set_xlabel(detector.manifest.score_name, fontsize=8)
    axis.legend(fontsize=7)


def main() -> None:
    out = ROOT / "docs" / "example.png"
    example(Detector.load(ROOT / "trained" / "fashion-mnist-pixelcnn"), out)
    bundles = [read_bundle(path) for path in find_bundles(ROOT / "trained")]
    detectors = [Detector.start(bundle) for bundle in bundles if bundle.manifest.kind == "density"]
    rows = math.ceil(len(detectors) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(12, 2.4 * rows), layout="constrained")
    for axis in axes.flat[len(detectors) :]:
        axis.set_axis_off()
    for axis, detector in zip(axes.flat, detectors, strict=False):
        histogram(detector, axis)
    figure.savefig(ROOT / "trained" / "scores.png", dpi=100)
    print(out, ROOT / "trained" / "scores.png")


if __name__ == "__main__":
    main()
