"""The numbers of deploy/SCALE.md: python tests/bench/bench_scale.py [--only NAME] [--images N].

Ratios compare two ways of the same work in one run; rates are of the machine it runs on, and of
what else that does meanwhile. `memory` and `deaths` score 1,020,000 and 120,000 images.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command line does

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cluster")]

from ray_nodes import (  # noqa: E402
    KEYS,
    Nodes,
    free_port,
    parts_of,
    png,
    rows_of,
    start,
    wait_for_parts,
)

from anomalyd.detect.detector import Detector  # noqa: E402
from anomalyd.detect.score import Scoring, Summary, score_rows, score_to_file  # noqa: E402
from anomalyd.sources import Source, open_paths, open_source  # noqa: E402

VAE, PIXELCNN = (ROOT / "trained" / f"fashion-mnist-{name}" for name in ("vae", "pixelcnn"))
Row = tuple[str, str, str]
BENCHES: list[Callable[[Path, int, Path], Iterator[Row]]] = []


def bench(function: Callable[[Path, int, Path], Iterator[Row]]) -> Callable[..., Iterator[Row]]:
    BENCHES.append(function)
    return function


def local_seconds(bundle: Path, source: Source, folder: Path, threads: int | None = None) -> float:
    """The local engine from the first image to the last, without loading the bundle.

    With one thread they are seconds of processor time: others on the machine do not count.
    """
    detector = Detector.load(bundle, device="cpu", threads=threads)
    scoring = Scoring(detector.alpha(None))
    if threads is None:
        began = time.perf_counter()
        score_to_file(detector, source, scoring, folder / "local.parquet")
        return time.perf_counter() - began
    used = time.process_time()
    for rows in score_rows(detector, source, scoring, Summary(), workers=threads):
        del rows
    return time.process_time() - used


def on_ray(*arguments: object, size: int = 1_000, code: int = 0) -> dict:
    """The manifest that the Ray engine leaves."""
    process = start("score", *arguments, size=size)
    _, said = process.communicate()
    assert process.returncode == code, said
    output = arguments[arguments.index("--output") + 1]
    return json.loads((Path(output) / "_manifest.json").read_text())


def limited(data: Path, count: int, folder: Path) -> Path:
    """The first images of the test set as .npy."""
    path = folder / f"first-{count}.npy"
    items = (item.payload for _, item in zip(range(count), test_set(data), strict=False))
    np.save(path, np.stack(list(items)))
    return path


def test_set(data: Path) -> Source:
    return open_source(data / "fashion-mnist", split="test")


@bench
def core(data: Path, images: int, folder: Path) -> Iterator[Row]:
    """One core alone: what capacity is counted in."""
    for bundle, count in ((VAE, images), (PIXELCNN, images // 10)):
        source = open_paths([limited(data, count, folder)])
        seconds = local_seconds(bundle, source, folder, threads=1)
        yield f"{bundle.name}: images a second of one core", f"{count / seconds:,.0f}", ""


@bench
def ratio(data: Path, images: int, folder: Path) -> Iterator[Row]:
    """Two actors of one thread against one process of two."""
    for bundle, count in ((PIXELCNN, images), (VAE, images)):
        path = limited(data, count, folder)
        local = local_seconds(bundle, open_paths([path]), folder)
        output = folder / f"{bundle.name}-parts"
        ray = on_ray(bundle, path, "--engine", "ray", "--output", output)["seconds"]
        yield (
            f"{bundle.name}: Ray with two workers against the local engine, {count:,} images",
            f"{count / ray:,.0f}/s against {count / local:,.0f}/s: {local / ray:.2f}",
            "0.85" if bundle == PIXELCNN else "",
        )


@bench
def parts(data: Path, images: int, folder: Path) -> Iterator[Row]:
    """What handing out a part costs: parts of one image each."""
    count = max(100, images // 20)
    path = limited(data, count, folder)
    output = folder / "ones"
    seconds = on_ray(VAE, path, "--engine", "ray", "--output", output, size=1)["seconds"]
    yield "parts that one driver hands out, /s", f"{count / seconds:,.0f}", ""


@bench
def sizes(data: Path, images: int, folder: Path) -> Iterator[Row]:
    """Bytes an image, on the network and on disk."""
    encoded = [png(i.payload) for _, i in zip(range(2_000), test_set(data), strict=False)]
    table = pa.table({"image": encoded})
    pq.write_table(table, folder / "images.parquet")
    size = (folder / "images.parquet").stat().st_size / len(encoded)
    yield "bytes of a 28x28 PNG", f"{np.mean([len(image) for image in encoded]):,.0f}", ""
    yield "the same in Parquet", f"{size:,.0f}", ""
    output = folder / "sized"
    on_ray(VAE, folder / "images.parquet", "--engine", "ray", "--output", output)
    rows = sum(path.stat().st_size for path in parts_of(output)) / len(encoded)
    yield "bytes of its row of scores", f"{rows:,.1f}", ""
    names = folder / "names"
    names.mkdir()
    for number, image in enumerate(encoded):
        (names / f"{number:012d}.png").write_bytes(image)
    on_ray(VAE, names, "--engine", "ray", "--output", folder / "named")
    plan = (folder / "named" / "_plan.parquet").stat().st_size / len(encoded)
    yield "bytes of its name in the plan, as a file of its own", f"{plan:,.1f}", ""


@bench
def requests(data: Path, images: int, folder: Path) -> Iterator[Row]:
    """What a store is asked for, from the log of an S3 server on loopback."""
    port, log = free_port(), folder / "requests.log"
    server = [ROOT / ".venv-proofs/s3/bin/moto_server", "-H", "127.0.0.1", "-p", str(port)]
    keys = KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    with log.open("w") as file:
        process = subprocess.Popen(server, stderr=file, stdout=subprocess.DEVNULL)
    try:
        os.environ.update(keys)
        while "Running on" not in log.read_text():
            time.sleep(0.2)
        files, _ = FileSystem.from_uri("s3://images/x?allow_bucket_creation=true")
        files.create_dir("images")
        for number, item in zip(range(100), test_set(data), strict=False):
            with files.open_output_stream(f"images/{number}.png") as stream:
                stream.write(png(item.payload))
        before = len(log.read_text().splitlines())
        list(open_source("s3://images"))
        asked = len(log.read_text().splitlines()) - before
        yield "requests to a store an image, each a file of its own", f"{asked / 100:.2f}", ""
    finally:
        process.terminate()
        process.wait(30)


class Peaks(threading.Thread):
    """The most memory that actors and driver ever had, MiB, seen from /proc."""

    def __init__(self, driver: int) -> None:
        super().__init__(daemon=True)
        self.driver, self.peaks, self.over = driver, {"actor": 0.0, "driver": 0.0}, False

    def run(self) -> None:
        while not self.over:
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit():
                    self._look(entry)
            time.sleep(0.5)

    def _look(self, entry: Path) -> None:
        try:
            command = (entry / "cmdline").read_bytes()
            status = (entry / "status").read_text()
        except OSError:
            return
        what = "driver" if int(entry.name) == self.driver else "actor"
        if what == "driver" or (command.startswith(b"ray::") and b"_Scorer" in command):
            line = next((x for x in status.splitlines() if x.startswith("VmHWM")), "VmHWM: 0")
            self.peaks[what] = max(self.peaks[what], int(line.split()[1]) / 1024)


@bench
def memory(data: Path, images: int, folder: Path) -> Iterator[Row]:
    """60,000 images, and the same set seventeen times over."""
    found = []
    for times in (1, 17):
        listed = folder / f"times-{times}.txt"
        listed.write_text(f"{data}/fashion-mnist:train\n" * times)
        output = folder / f"memory-{times}"
        process = start(
            "score", VAE, f"@{listed}", "--engine", "ray", "--output", output, size=1_000
        )
        peaks = Peaks(process.pid)
        peaks.start()
        _, said = process.communicate()
        peaks.over = True
        assert process.returncode == 0, said
        found.append(peaks.peaks)
        shown = ", ".join(f"{what} {peak:,.0f} MiB" for what, peak in peaks.peaks.items())
        yield f"peak memory, {60_000 * times:,} images", shown, ""
    for what in found[0]:
        yield f"{what}: that against 60,000", f"{found[1][what] / found[0][what]:.2f}", "flat"


@bench
def deaths(data: Path, images: int, folder: Path) -> Iterator[Row]:
    """Three nodes and 60,000 images: one node dies in the middle; then the driver does."""
    nodes = Nodes("http://127.0.0.1:1")
    doomed, _ = nodes.add(), nodes.add()
    asked = ["score", VAE, f"{data}/fashion-mnist:train", "--engine", "ray"]
    asked += ["--ray-address", nodes.address, "--output"]
    output = folder / "node"
    process = start(*asked, output, size=1_000)
    wait_for_parts(output, 20, process)
    nodes.kill(doomed)
    assert process.wait() == 0, process.communicate()
    index = [row["index"] for row in rows_of(output)]
    lost, twice = 60_000 - len(set(index)), len(index) - len(set(index))
    yield "a node of three killed: images lost, duplicated", f"{lost}, {twice}", "0, 0"
    output = folder / "driver"
    process = start(*asked, output, size=1_000)
    wait_for_parts(output, 20, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in parts_of(output)}
    on_ray(*asked[1:], output)
    again = sum(path.stat().st_mtime_ns != then for path, then in kept.items())
    index = [row["index"] for row in rows_of(output)]
    lost, twice = 60_000 - len(set(index)), len(index) - len(set(index))
    yield (
        "driver killed and run again: parts kept, scored twice; images lost, duplicated",
        f"{len(kept)} of 60, {again}; {lost}, {twice}",
        "scored twice 0; 0, 0",
    )
    nodes.close()


RECIPE = """
model = "gated-pixelcnn"
[density]
features = 32
[train]
epochs = {epochs}
batch_size = 32
evaluations = 2
"""


@bench
def workers(data: Path, images: int, folder: Path) -> Iterator[Row]:
    """Training by two workers of one thread against one process of two."""
    rates, bits = [], []
    np.save(folder / "train.npy", np.stack([i.payload for i in _first(data, 10_000)]))
    (folder / "recipe.toml").write_text(RECIPE.format(epochs=max(0.1, images / 10_000)))
    launchers = {1: ["-m", "anomalyd"]}
    launchers[2] = [*["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]]
    launchers[2] += ["-m", "anomalyd"]
    for number, launcher in launchers.items():
        out = folder / f"workers-{number}"
        command = [sys.executable, *launcher, "train", str(folder / "train.npy")]
        command += ["--recipe", str(folder / "recipe.toml"), "--out", str(out)]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        with (folder / f"workers-{number}.run" / "history.csv").open() as file:
            middle, end = list(csv.DictReader(file))[-2:]
        steps = int(end["step"]) - int(middle["step"])
        rates.append(steps * 32 / (float(end["seconds"]) - float(middle["seconds"])))
        bits.append(float(end["validation_bits/dim"]))
    shown = f"{rates[1]:,.0f}/s against {rates[0]:,.0f}/s: {rates[1] / rates[0]:.2f}"
    yield "training by two workers against one process with two threads", shown, "0.8"
    difference = abs(bits[1] - bits[0])
    yield "bits/dim after the same images, difference", f"{difference:.4f}", "0.01"


def _first(data: Path, count: int) -> Iterator:
    source = open_source(data / "fashion-mnist", split="train")
    return (item for _, item in zip(range(count), source, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    parser.add_argument("--only", default="")
    parser.add_argument("--images", type=int, default=10_000)
    asked = parser.parse_args()
    print("| what | measured | aim |\n|---|---|---|")
    for function in BENCHES:
        if asked.only in ("", function.__name__):
            with tempfile.TemporaryDirectory(prefix="anomalyd-bench-") as folder:
                for row in function(asked.data.resolve(), asked.images, Path(folder)):
                    print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
