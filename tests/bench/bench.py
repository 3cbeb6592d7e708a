"""Every number that README and cards publish about speed, memory and false alarms.

    python tests/bench/bench.py --data ../shared/data [--only NAME]

Ratios compare two ways of doing the same work in the same run on the same machine; absolute
figures are this machine's. Prints one Markdown table; what misses its target says so.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command line does

import numpy as np
from bench_serve import PARTS, Row, daemon, get, row
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers
from make_fixture import with_noise

from anomalyd.detect.bundle import read_bundle
from anomalyd.detect.conformal import p_table, p_values
from anomalyd.detect.detector import Detector
from anomalyd.detect.runtime import Session
from anomalyd.detect.sample import Sampler
from anomalyd.detect.score import Scoring, score_to_stream
from anomalyd.images import to_pixels
from anomalyd.sources import open_source
from anomalyd.train.recipe import parse_recipe

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "trained"
ANOMALYD = str(Path(sys.executable).with_name("anomalyd"))
FOUR = ("fashion-mnist-pixelcnn", "fashion-mnist-vae", "mnist-pixelcnn", "mnist-vae")
SHOWN = {name: name.rpartition("-")[0] for name in (*FOUR, "fashion-mnist-bayes", "mnist-bayes")}
SHOWN |= {"cifar10": "cifar10"}  # bundle -> data set
AIMS = {"fashion-mnist-pixelcnn": 2.80, "mnist-pixelcnn": 0.80, "cifar10": 3.3}  # bits/dim
BENCHES: list[Callable[[Path], Iterator[Row]]] = []


def bench(function: Callable[[Path], Iterator[Row]]) -> Callable[[Path], Iterator[Row]]:
    BENCHES.append(function)
    return function


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """The fastest of a few runs."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def processor_seconds(sessions: dict[str, Session], images: np.ndarray) -> dict[str, float]:
    """What each graph takes for the images, the best of six."""
    took = dict.fromkeys(sessions, float("inf"))
    for _ in range(6):  # in turn, so that what else the machine does meets all alike
        for what, session in sessions.items():
            began = time.process_time()
            session.run(images)
            took[what] = min(took[what], time.process_time() - began)
    return took


def images_of(data: Path, name: str, n: int = 10_000) -> np.ndarray:
    items = open_source(data / name, split="test")
    images = [item.payload for _, item in zip(range(n), items, strict=False)]
    return np.stack(images).reshape(-1, 28, 28, 1)


@bench
def density(data: Path) -> Iterator[Row]:
    """Bits per dimension of the bundles in README's table, measured; of others, as they state."""
    for folder in sorted(TRAINED.glob("*/manifest.json")):
        manifest = json.loads(folder.read_text())
        name = manifest["name"]
        if (bits := manifest["bits_per_dim"]["test"]) is None:
            continue
        how = "from its manifest"
        if name in SHOWN:
            bits, how = test_bits(folder.parent, data / SHOWN[name]), "measured"
        what = f"{name}: bits/dim on the test split, {how}"
        yield row(what, bits, "{:.4f}", high=AIMS.get(name))
        high = 700_000 if name == "fashion-mnist-pixelcnn" else None
        yield row(f"{name}: parameters", manifest["parameters"], "{:,}", high=high)
        size = sum(path.stat().st_size for path in folder.parent.iterdir()) / 2**20
        yield row(f"{name}: bundle, MiB", size, "{:.2f}", high=12 if name in FOUR else None)


def test_bits(bundle: Path, data: Path) -> float:
    """Mean bits per dimension of a test split, scored here."""
    detector = Detector.load(bundle)
    source = iter(open_source(data, split="test"))
    bits = []
    while payloads := [item.payload for item in itertools.islice(source, 1_000)]:
        images = np.stack([to_pixels(payload, detector.spec) for payload in payloads])
        bits.append(detector.columns(detector.session.run(images), 0.5).bits_per_dim)
    return float(np.concatenate(bits).mean())


@bench
def false_alarms(data: Path) -> Iterator[Row]:
    """200 random splits of pooled calibration-size and test images: the mean realised rate."""
    for number, name in enumerate(FOUR):
        detector = Detector.load(TRAINED / name)
        images = images_of(data, name.rsplit("-", 1)[0])
        judged = detector.columns(detector.session.run(images), 0.5)
        pooled = np.concatenate([detector.calibration.scores, judged.score])
        n, rng = len(detector.calibration.scores), np.random.default_rng([number, 0])
        table = p_table(n)
        rates = {0.01: [], 0.05: []}
        for _ in range(200):
            mixed = rng.permutation(pooled)
            p = p_values(mixed[n:], np.sort(mixed[:n]), table)
            for alpha, found in rates.items():
                found.append(float((p <= alpha).mean()))
        for alpha, found in rates.items():
            promised = np.floor((n + 1) * alpha) / (n + 1)
            error = np.std(found) / np.sqrt(len(found))
            off = abs(np.mean(found) - promised) / error
            mean = np.mean(found)
            what = f"{name}: mean false alarms at {alpha:g} are {mean:.5f}; standard errors off"
            yield row(what, float(off), "{:.2f}", high=2.0)


@bench
def recall(data: Path) -> Iterator[Row]:
    """The share of outliers that the default alpha catches, single images."""
    for name, normal, other in (
        ("fashion-mnist-pixelcnn", "fashion-mnist", "mnist"),
        ("fashion-mnist-vae", "fashion-mnist", "mnist"),
        ("mnist-pixelcnn", "mnist", "fashion-mnist"),
        ("mnist-vae", "mnist", "fashion-mnist"),
    ):
        detector = Detector.load(TRAINED / name)
        for what, images in (
            ("a fifth of the pixels noise", with_noise(images_of(data, normal, 2_000))),
            (other, images_of(data, other, 2_000)),
        ):
            judged = detector.columns(detector.session.run(images), detector.alpha(None))
            yield row(f"{name}: caught at 0.01, {what}", judged.outlier.mean(), "{:.3f}")


@bench
def training_speed(data: Path) -> Iterator[Row]:
    """The recipe's step against the same density's plain float32 NCHW loop."""
    import torch

    from anomalyd.images import ImageSpec
    from anomalyd.train.loop import _Run
    from anomalyd.train.models import build
    from anomalyd.train.recipe import default_recipe
    from anomalyd.train.splits import split
    from anomalyd.train.workers import ALONE

    images = images_of(data, "fashion-mnist", 2000)
    torch.set_num_threads(os.cpu_count() or 1)
    options = default_recipe("gated-pixelcnn").density | {"features": 32}
    settings = default_recipe("gated-pixelcnn").train
    hashes = np.arange(len(images), dtype=np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        model = build("gated-pixelcnn", ImageSpec(28, 28, 1), options)
        rows = split(hashes, [None] * len(hashes))
        run = _Run(model, images, None, rows, settings, Path(folder), torch.device("cpu"), ALONE)
        run.budget = 10**6
        for _ in range(3):
            run.train_step()
        ours = settings.batch_size * 20 / seconds(lambda: [run.train_step() for _ in range(20)])
    plain = build("gated-pixelcnn", ImageSpec(28, 28, 1), options)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)

    def step(start: int) -> None:
        loss = plain.loss(torch.from_numpy(images[start : start + settings.batch_size]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step(0)
    theirs = settings.batch_size * 20 / seconds(lambda: [step(16 * i) for i in range(20)])
    count = sum(p.numel() for p in plain.parameters())
    yield row(f"training, {count:,} parameters: images/s", ours, "{:.0f}")
    yield row("training: its own float32 NCHW loop, images/s", theirs, "{:.0f}")
    yield row("training: ratio", ours / theirs, "{:.2f}", low=1.8)


@bench
def scoring(data: Path) -> Iterator[Row]:
    """`anomalyd score` to JSON lines against onnxruntime alone on the same graph."""
    cases = (
        ("fashion-mnist-pixelcnn", 512, {"png": 0.9}),
        ("fashion-mnist-vae", 10_000, {"idx": 0.9, "png": 0.6}),
    )
    for name, n, kinds in cases:
        detector = Detector.load(TRAINED / name)
        images = images_of(data, "fashion-mnist", n)
        bare = n / seconds(lambda d=detector, x=images: d.session.run(x))
        yield row(f"{name}: onnxruntime alone, images/s", bare, "{:,.0f}")
        with tempfile.TemporaryDirectory() as folder:
            for i, image in enumerate(images):
                Image.fromarray(image[..., 0]).save(Path(folder) / f"{i:05}.png")
            np.save(Path(folder) / "images.npy", images)
            for kind, low in kinds.items():
                place = folder if kind == "png" else str(data / "fashion-mnist") + ":test"
                if kind == "png":
                    (Path(folder) / "images.npy").unlink(missing_ok=True)

                def score(d=detector, place=place) -> None:
                    with Path(os.devnull).open("wb") as out:
                        score_to_stream(d, open_source(place), Scoring(0.01), "jsonl", out)

                speed = n / seconds(score)
                yield row(f"{name}: from {kind.upper()}, images/s", speed, "{:,.0f}")
                yield row(f"{name}: from {kind.upper()}, ratio", speed / bare, "{:.2f}", low=low)


@bench
def sampling(data: Path) -> Iterator[Row]:
    """Sixteen Fashion-MNIST images by each method, from the same noise."""
    # The others take minutes for the loop.
    for name, slowest in (
        ("fashion-mnist-pixelcnn", "loop"),
        ("fashion-mnist-pixelcnnpp", "jacobi"),
        ("fashion-mnist-diagonal-bilstm", "jacobi"),
    ):
        sampler = Sampler.load(TRAINED / name, device="cpu")
        what, took, drawn = f"{name}: 16 samples", {}, {}
        for method in ("cached", "jacobi", slowest):
            if method in took:
                continue
            spent = []
            for _ in range(3 if method == "cached" else 1):
                began = time.perf_counter()
                drawn[method] = sampler.draw(16, method=method, seed=0)
                spent.append(time.perf_counter() - began)
            took[method] = statistics.median(spent)
            yield row(f"{what}, {method}: seconds", took[method], "{:.2f}")
        yield row(f"{what}, jacobi: runs, where the loop has 784", drawn["jacobi"].runs, "{}")
        whole = drawn[slowest]
        for method in drawn.keys() - {slowest}:
            other = int((drawn[method].images != whole.images).any(axis=(1, 2, 3)).sum())
            yield row(f"{what}, {method}: images that differ from the {slowest}'s", other, "{}")
        yield row(f"{what}: values within 1e-6 of another level", whole.near_ties, "{}")
        ratio = took[slowest] / took[sampler.method("auto")]
        low = 100 if slowest == "loop" else None
        yield row(
            f"{what}: the default against the {slowest}, times faster", ratio, "{:.0f}", low=low
        )


@bench
def kernels(data: Path) -> Iterator[Row]:
    """nll of the gated PixelCNN as exported, and as it is usually written; what the score adds."""
    from masked import MaskedGatedPixelCNN, NllAlone

    from anomalyd.density.base import ImageShape
    from anomalyd.train.export import to_onnx
    from anomalyd.train.models import assemble
    from anomalyd.train.weights import load_weights

    images = images_of(data, "mnist", 128)
    for name in ("mnist-pixelcnn", "fashion-mnist-pixelcnn"):
        bundle = read_bundle(TRAINED / name)
        recipe = parse_recipe(bundle.read("recipe.toml").decode(), "recipe")
        model = assemble(recipe, bundle.manifest.image)
        load_weights(model, bundle.read("weights.safetensors"), name)
        options = {key: value for key, value in recipe.density.items() if key != "pixel"}
        sessions = {
            what: Session(to_onnx(density), device="cpu", threads=1)
            for what, density in (
                ("default score", model),
                ("nll alone", NllAlone(model.main)),
                ("masked", NllAlone(MaskedGatedPixelCNN(ImageShape(28, 28), **options))),
            )
        }
        took = processor_seconds(sessions, images)
        ratio = took["masked"] / took["nll alone"]
        yield row(
            f"{name}: images/s of masked kernels and a full softmax, times", ratio, "{:.2f}", 2.0
        )
        ratio = took["default score"] / took["nll alone"]
        yield row(
            f"{name}: cost of the default score over nll alone, times", ratio, "{:.2f}", high=2.5
        )


@bench
def softmaxes(data: Path) -> Iterator[Row]:
    """Cropped kernels and two short softmaxes against masked kernels and one of 256 levels.

    Both see the same images in the same steps, from three seeds.
    """
    import torch
    from masked import NllAlone, from_gated

    from anomalyd.density.base import ImageShape
    from anomalyd.density.gated_pixelcnn import GatedPixelCNN
    from anomalyd.train.export import to_onnx

    steps, images = 100, torch.from_numpy(images_of(data, "mnist", 3_000))
    options = {
        "24 features": {"features": 24, "pixel": "hierarchical"},
        "24 features, masked, 256 levels": {"features": 24, "pixel": "categorical"},
    }
    bits, sessions = {}, {}
    for name, chosen in options.items():
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            model = GatedPixelCNN(ImageShape(28, 28), **chosen)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            for step in range(steps):
                loss = model.loss(images[step * 16 : step * 16 + 16])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                found.append(model.loss(images[-250:]).item())
        bits[name] = statistics.mean(found)
        # Masked, every number stays what it was; only the way to it is longer.
        written = from_gated(model) if chosen["pixel"] == "categorical" else model
        sessions[name] = Session(to_onnx(NllAlone(written)), device="cpu", threads=1)
    took = processor_seconds(sessions, images[:128].numpy())
    ours, theirs = options
    for name in options:
        yield row(f"{name}, {steps} steps: bits/dim on 250 other images", bits[name], "{:.4f}")
    yield row(
        "the first against the second: bits/dim", bits[ours] / bits[theirs], "{:.3f}", high=1
    )
    yield row(
        "the first against the second: images/s, times", took[theirs] / took[ours], "{:.2f}", low=2
    )


@bench
def family(data: Path) -> Iterator[Row]:
    """Measure every bundle anew and write the table in trained/README.md."""
    script = Path(__file__).with_name("results.py")
    subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((TRAINED / "results.json").read_text())
    yield row("rows in trained/README.md", len(rows), "{}")


def resident_mib(n: int, data: Path) -> float:
    """Peak memory of a process that scores n images with the VAE."""
    code = (
        "import sys, itertools\n"
        "from anomalyd.detect.detector import Detector\n"
        "from anomalyd.detect.pipeline import scored\n"
        "from anomalyd.sources import open_source\n"
        "d = Detector.load(sys.argv[1]); n = int(sys.argv[3])\n"
        "for _ in scored(d.session, d.spec, itertools.islice(open_source(sys.argv[2]), n)): pass\n"
        # not ru_maxrss, which a child inherits from whoever started it
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print(next(int(l.split()[1]) for l in lines if l.startswith('VmHWM')) / 1024)\n"
    )
    source = str(data / "fashion-mnist") + ":train"
    command = [sys.executable, "-c", code, str(TRAINED / "fashion-mnist-vae"), source, str(n)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@bench
def memory(data: Path) -> Iterator[Row]:
    """Peak memory of a batch job does not grow with its size."""
    few, many = resident_mib(1_000, data), resident_mib(60_000, data)
    yield row("scoring 1,000 images: peak memory, MiB", few, "{:.0f}")
    yield row("scoring 60,000 images: memory against 1,000", many / few, "{:.2f}", high=1.1)


@bench
def start_up(data: Path) -> Iterator[Row]:
    """How long a user waits, and what an idle daemon holds."""
    help_ = seconds(lambda: subprocess.run([ANOMALYD, "--help"], capture_output=True), 5)
    yield row("anomalyd --help, ms", help_ * 1000, "{:.0f}", high=150)
    with daemon(str(TRAINED)) as (port, starting):
        yield row("start to /readyz with all of trained/, s", starting, "{:.2f}", high=2.0)
        time.sleep(1)
        metrics = get(port, "/metrics")[1]
        memory = next(
            float(line.split()[1])
            for line in metrics.splitlines()
            if line.startswith("process_resident_memory_bytes ")
        )
        yield row("idle memory with all of trained/, MiB", memory / 2**20, "{:.0f}", high=160)


@bench
def serving(data: Path) -> Iterator[Row]:
    """The daemon under load: see bench_serve.py."""
    for part in PARTS.values():
        yield from part(5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    if not (asked.data / "fashion-mnist").is_dir():
        sys.exit(f"bench: no data at {asked.data}, which docs/data.md lists; give --data FOLDER")
    print("| what | measured | target | met |\n|---|---|---|---|")
    for function in BENCHES:
        if asked.only in function.__name__:
            for what, value, target, met in function(asked.data):
                mark = "" if met is None else "yes" if met else "NO"
                print(f"| {what} | {value} | {target} | {mark} |", flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
