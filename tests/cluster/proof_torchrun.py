"""Training by the workers of torchrun: one process's result, and a death in the middle of it."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_nodes import ROOT

from anomalyd.detect.bundle import read_bundle

pytestmark = pytest.mark.by("torchrun")

DATA = ROOT / "tests" / "fixtures" / "fashion-mnist"
MODELS = {
    # Exact and without noise, and its graphs are two.
    "pixelcnn": 'features = 8\nblocks = 1\npixel = "logistic-mixture"',
    # No density, and so nothing to sample or calibrate: its bundle is written in no time.
    "autoencoder": "",
}
RECIPE = """
model = "{model}"
[density]
{density}
[train]
epochs = {epochs}
batch_size = 15
learning_rate = 0.01
checkpoint_seconds = 0.0
evaluations = 4
"""


def written(folder: Path, model: str, epochs: float) -> Path:
    recipe = folder / f"{model}-{epochs}.toml"
    recipe.write_text(RECIPE.format(model=model, density=MODELS[model], epochs=epochs))
    return recipe


def train(
    out: Path,
    *arguments: str,
    model: str = "autoencoder",
    workers: int = 1,
    restarts: int = 0,
    epochs: float = 1.0,
) -> subprocess.Popen[str]:
    """`anomalyd train`, of one process or under torchrun."""
    recipe = written(out.parent, model, epochs)
    launcher = ["-m", "anomalyd"]
    if workers > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launcher += [str(workers), "--max-restarts", str(restarts), "-m", "anomalyd"]
    given = arguments or (str(DATA), "--recipe", str(recipe), "--image-size", "14")
    return subprocess.Popen(
        [sys.executable, *launcher, "train", *given, "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(process) -> str:
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def validation(out: Path) -> list[float]:
    """The validation loss, every time it was measured."""
    with out.with_name(f"{out.name}.run").joinpath("history.csv").open() as file:
        return [float(row[-1]) for row in list(csv.reader(file))[1:]]


def test_two_workers_take_the_steps_of_one(tmp_path):
    """The same bits/dim at every validation, to float32's rounding; one of them speaks."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    done(train(alone, model="pixelcnn"))
    said = done(train(together, model="pixelcnn", workers=2))

    assert validation(together) == pytest.approx(validation(alone), abs=1e-3)
    assert said.count("300 images: train") == 1
    one, two = (read_bundle(path).manifest for path in (alone, together))
    assert one.bits_per_dim["test"] == pytest.approx(two.bits_per_dim["test"], abs=0.01)
    assert one.calibration_n == two.calibration_n


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def after_a_checkpoint(process, out: Path) -> None:
    while not out.with_name(f"{out.name}.run").joinpath("checkpoint.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_killed_worker_is_started_again(tmp_path):
    """torchrun restarts all of them; they go on at the checkpoint, with no flag added."""
    out = tmp_path / "clothes"
    process = train(out, workers=2, restarts=2, epochs=3.0)
    after_a_checkpoint(process, out)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    said = done(process)

    assert said.count("300 images: train") == 2
    assert (out / "manifest.json").exists()
    assert len(validation(out)) in (4, 5)


def test_a_run_goes_on_with_another_number_of_workers(tmp_path):
    """Two workers begin, one process ends it: the result is what one alone comes to."""
    alone, out = tmp_path / "alone", tmp_path / "clothes"
    done(train(alone))
    process = train(out, workers=2)
    after_a_checkpoint(process, out)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    process.communicate()
    done(train(out, "--resume", str(DATA)))

    assert validation(out)[-1] == pytest.approx(validation(alone)[-1], abs=0.01)


def test_more_workers_than_images_in_a_batch_is_one_line_a_worker(tmp_path):
    """A mistake of the user's ends it with its reason."""
    recipe = tmp_path / "one.toml"
    text = written(tmp_path, "autoencoder", 1.0).read_text()
    recipe.write_text(text.replace("batch_size = 15", "batch_size = 1"))
    process = train(tmp_path / "x", str(DATA), "--recipe", str(recipe), workers=2)
    _, said = process.communicate(timeout=600)

    assert process.returncode == 1
    assert "anomalyd: batch_size 1 in the recipe is less than one image for each of 2" in said
