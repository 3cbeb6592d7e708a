"""The protocol tables of trained/README.md: what each bundle's default score makes of outliers.

    python tests/bench/protocol.py [BUNDLE...] [--limit 2000] [--quick] [--unseen]
    python tests/bench/protocol.py --leave-one-out [SET...] [--minutes 3]

Each named bundle is measured against every set of `outlier_sets.py` that is an outlier to its own
normal set, single images. `--unseen` is for scores that are frozen. With `--leave-one-out` a VAE
is trained on nine classes of a set, on one core, and the tenth is the outlier, for all ten.

The rows are kept in trained/protocol.json: those of bundles and sets that a run does not measure
stay as they were, so a bundle that was trained anew takes --unseen. Those of a bundle outside
trained/ are only printed. Glyph sets need Debian's fonts: `make fonts`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from glyphs import GLYPHS, missing
from outlier_sets import (
    CORRUPTIONS,
    DATA,
    SETS,
    UNSEEN,
    Pixels,
    images_of,
    names,
    outlier_set,
)

from anomalyd.detect.conformal import clopper_pearson
from anomalyd.detect.detector import Detector
from anomalyd.detect.measures import auroc, fpr95
from anomalyd.errors import AnomalydError
from anomalyd.images import content_hash
from anomalyd.sources import open_source

TRAINED = Path(__file__).parents[2] / "trained"
RESULTS = TRAINED / "protocol.json"
BUNDLES = (
    "fashion-mnist-pixelcnn",
    "mnist-pixelcnn",
    "fashion-mnist-vae",
    "mnist-vae",
    "cifar10",
)
CLOTHES = "T-shirt, trousers, pullover, dress, coat, sandal, shirt, sneaker, bag, boot"
CLASSES = {"fashion-mnist": CLOTHES.split(", "), "mnist": list("0123456789")}
QUICK = 200
DIGITS = 6
BEGIN, END = "<!-- protocol: made by make protocol -->\n", "<!-- end of protocol -->\n"
Row = dict[str, Any]


# --- measuring --------------------------------------------------------------------------------


def measured(path: Path, *, limit: int, unseen: bool, data: Path) -> Row:
    """A bundle's rows: its normal images, then set by set."""
    detector = Detector.load(path)
    normal = normal_set(detector.manifest.name)
    image = detector.spec
    shape = (image.height, image.width, image.channels)
    normals = images_of(normal, shape, limit, np.random.default_rng(0), data)
    compare = against(detector, normals)
    rows = {}
    for name in names(normal, unseen=unseen):
        rows[name] = compare(outlier_set(name, shape, limit, data=data, normal=normal))
        print(line(name, rows[name]), end="", flush=True)
    return {
        "score": detector.manifest.score_name,
        "normal": normal,
        "alpha": detector.manifest.default_alpha,
        "n": len(normals),
        "false_alarms": compare(normals)["recall"],
        "sets": rows,
    }


def against(detector: Detector, normals: Pixels) -> Callable[[Pixels], Row]:
    """What compares outliers with these normal images, less those that the bundle has seen."""
    from sklearn.metrics import average_precision_score

    alpha = detector.manifest.default_alpha
    calibration = detector.calibration
    known = np.concatenate([calibration.training_hashes, calibration.calibration_hashes])
    hashes = np.array([content_hash(image) for image in normals], np.uint64)
    normal_raw = detector.session.run(normals[~np.isin(hashes, known)])
    normal_score = detector.columns(normal_raw, alpha).score
    normal_nll = detector.nll(normal_raw)

    def compare(outliers: Pixels) -> Row:
        raw = detector.session.run(outliers)
        judged = detector.columns(raw, alpha)
        caught, n = int(judged.outlier.sum()), len(outliers)
        # Weights make outliers as common as normals, whatever the sizes of the sets.
        truth = np.repeat([0, 1], [len(normal_score), n])
        weight = np.repeat([1 / len(normal_score), 1 / n], [len(normal_score), n])
        both = np.concatenate([normal_score, judged.score])
        return {
            "n": n,
            "auroc": rounded(auroc(normal_score, judged.score)),
            "nll": rounded(auroc(normal_nll, detector.nll(raw))),
            "aupr": rounded(average_precision_score(truth, both, sample_weight=weight)),
            "fpr95": rounded(fpr95(normal_score, judged.score)),
            "recall": rounded(caught / n),
            "ci95": [rounded(end) for end in clopper_pearson(caught, n)],
        }

    return compare


def merged(known: Row, fresh: Row) -> Row:
    """A bundle's rows with those just measured among them; no row is lost."""
    return fresh | {"sets": known.get("sets", {}) | fresh["sets"]}


def check_comparable(name: str, known: Row, *, limit: int, unseen: bool) -> None:
    """See that rows which stay were measured against as many normal images."""
    if known and not unseen and known["n"] != limit:
        raise SystemExit(
            f"protocol: the rows of {name} are of {known['n']} normal images; with "
            f"--limit {known['n']} others join them, with --unseen all are measured anew"
        )


def normal_set(bundle: str) -> str:
    """The set that a bundle was trained on, by which its name begins."""
    for name in SETS:
        if bundle.startswith(name):
            return name
    raise SystemExit(
        f"protocol: bundle {bundle}: its name begins with none of {', '.join(SETS)}, so its "
        "normal images are not known here"
    )


def left_out(name: str, label: int, asked: argparse.Namespace, folder: Path) -> Row:
    """Train the `vae` recipe without one class, and compare that class with the other nine."""
    from anomalyd.train.commands import train

    kept, out = folder / "kept.npy", folder / f"without-{label}"
    pixels, labels = labelled(asked.data / name, "train")
    np.save(kept, pixels[labels != label])
    train(data=str(kept), model="vae", out=out, minutes=asked.minutes, device="cpu")
    pixels, labels = labelled(asked.data / name, "test")
    others = np.random.default_rng(0).permutation(pixels[labels != label])
    compare = against(Detector.load(out, threads=1), others[: asked.limit])
    return compare(pixels[labels == label][: asked.limit]) | {"minutes": asked.minutes}


def labelled(path: Path, split: str) -> tuple[Pixels, np.ndarray]:
    """Images uint8 (N, 28, 28, 1) and their classes int64 (N,)."""
    items = list(open_source(path, split=split, labels=True))
    pixels = np.stack([item.payload for item in items]).reshape(-1, 28, 28, 1)
    return pixels, np.array([int(item.label) for item in items])


def rounded(value: float) -> float:
    return round(float(value), DIGITS)


# --- the page ---------------------------------------------------------------------------------

HEADING = (
    "| images | AUROC | of nll | AUPR | FPR95 | caught at alpha | 95 % |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def rendered(results: Row) -> str:
    """The tables as Markdown: one summary, then the rows of each bundle, folded away."""
    bundles = {name: results["bundles"][name] for name in sorted(results["bundles"])}
    text = (
        "| bundle | score | false alarms | worst pair | worst glyphs | worst corruption "
        "| worst unseen | most below nll |\n|---|---|---|---|---|---|---|---|\n"
    )
    text += "".join(summary(name, bundle) for name, bundle in bundles.items())
    for name, bundle in bundles.items():
        about = f"{name}: {bundle['n']:,} normal images, alpha {bundle['alpha']:g}"
        text += folded(about, table("outliers", bundle["sets"]))
    for name, rows in results["left_out"].items():
        minutes = max(row["minutes"] for row in rows.values())
        mean = np.mean([row["auroc"] for row in rows.values()])
        about = (
            f"{name}, one class left out: a VAE of {minutes:g} minutes on one core each, "
            f"mean AUROC {mean:.4f}"
        )
        named = {CLASSES[name][int(label)]: rows[label] for label in sorted(rows)}
        text += folded(about, table("left out", named))
    return text


def summary(name: str, bundle: Row) -> str:
    """A bundle's line: its lowest AUROC in each kind of set, and the most that nll is above it."""
    rows = bundle["sets"]

    def worst(of: Iterable[str]) -> str:
        found = [(rows[name]["auroc"], name) for name in of if name in rows]
        return "" if not found else "{1} {0:.4f}".format(*min(found))

    seen = [name for name in rows if name not in UNSEEN]
    lost, where = max((row["nll"] - row["auroc"], name) for name, row in rows.items())
    cells = [
        name,
        bundle["score"],
        f"{bundle['false_alarms']:.4f}",
        worst(SETS),
        worst(name for name in seen if name.removesuffix("-large") in GLYPHS),
        worst(CORRUPTIONS),
        worst(UNSEEN),
        f"{lost:.4f}, {where}" if lost > 0 else "never",
    ]
    return f"| {' | '.join(cells)} |\n"


def table(what: str, rows: dict[str, Row]) -> str:
    return f"| {what} {HEADING}" + "".join(line(name, row) for name, row in rows.items())


def line(name: str, row: Row) -> str:
    """One row of a table."""
    low, high = row["ci95"]
    shown = (f"{row[key]:.4f}" for key in ("auroc", "nll", "aupr", "fpr95", "recall"))
    mark = " (unseen)" if name in UNSEEN else ""
    return f"| {name}{mark} | {row['n']:,} | {' | '.join(shown)} | {low:.3f} - {high:.3f} |\n"


def folded(about: str, text: str) -> str:
    return f"\n<details><summary>{about}</summary>\n\n{text}\n</details>\n"


def keep(results: Row) -> None:
    """Write the rows, and the page that shows them."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page = TRAINED / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + rendered(results) + END + rest.partition(END)[2])


# --- the command ------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="*", type=Path, help="default: the five of the page")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--limit", type=int, default=2_000, help="images a set, at most")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK} images a set; nothing is written"
    )
    parser.add_argument("--unseen", action="store_true", help="the sets no score was chosen by")
    parser.add_argument("--leave-one-out", nargs="*", metavar="SET", choices=CLASSES)
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, a class")
    asked = parser.parse_args()
    if asked.limit < 2 or asked.minutes <= 0:
        parser.error("--limit must be at least 2 and --minutes above 0")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = {"bundles": {}, "left_out": {}} | known
    if asked.quick:
        asked.limit = QUICK
    try:
        if asked.leave_one_out is not None:
            leave_one_out(asked, results)
        else:
            measure(asked, results)
    except AnomalydError as error:
        sys.exit(f"protocol: {error}")


def measure(asked: argparse.Namespace, results: Row) -> None:
    sets = [name for name in GLYPHS if asked.unseen or name not in UNSEEN]
    if packages := missing(sets):
        sys.exit(
            f"protocol: fonts are missing; as root, `apt-get install {' '.join(packages)}`, or "
            "`make fonts`"
        )
    there = (TRAINED / name for name in BUNDLES if (TRAINED / name).is_dir())
    for path in asked.bundles or there:
        kept = not asked.quick and path.resolve().parent == TRAINED
        known = results["bundles"].get(path.name, {}) if kept else {}
        check_comparable(path.name, known, limit=asked.limit, unseen=asked.unseen)
        print(f"\n| {path.name} {HEADING}", end="", flush=True)
        row = measured(path, limit=asked.limit, unseen=asked.unseen, data=asked.data)
        if kept:
            results["bundles"][path.name] = merged(known, row)
            keep(results)


def leave_one_out(asked: argparse.Namespace, results: Row) -> None:
    # One core, also for the threads of torch and onnxruntime, so that --minutes compare.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for name in asked.leave_one_out or CLASSES:
        rows = results["left_out"].setdefault(name, {})
        for label, title in enumerate(CLASSES[name]):
            with tempfile.TemporaryDirectory() as folder:
                row = left_out(name, label, asked, Path(folder))
            print(line(title, row), end="", flush=True)
            if not asked.quick:
                rows[str(label)] = row
                keep(results)


if __name__ == "__main__":
    main()
