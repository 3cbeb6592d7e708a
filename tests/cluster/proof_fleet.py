"""One density for each sub-folder: those that fail are named, and tried again alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from ray_nodes import ROOT, run

from anomalyd.detect.bundle import read_bundle
from anomalyd.sources import open_source

pytestmark = pytest.mark.by("Ray")

RECIPE = """
model = "vae"
[density]
features = 4
latent = 4
components = 2
[train]
epochs = 1.0
batch_size = 16
"""


def test_each_folder_becomes_a_bundle_and_a_failed_one_is_tried_alone(nodes, tmp_path):
    """Three cameras, one of which has no image that can be read until it is mended."""
    images = [i.payload for i in open_source(ROOT / "tests/fixtures/mnist", split="train")][:120]
    for number, camera in enumerate(("east", "north", "south")):
        folder = tmp_path / "cameras" / camera
        folder.mkdir(parents=True)
        for row, image in enumerate(images[40 * number : 40 * number + 40]):
            if camera == "north":
                (folder / f"{row}.png").write_bytes(b"no image")
            else:
                Image.fromarray(np.asarray(image)).save(folder / f"{row}.png")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    asked = [
        "train", "--per-folder", tmp_path / "cameras", "--recipe", tmp_path / "recipe.toml",
        "--image-size", "28", "--channels", "1", "--out", tmp_path / "models",
        "--ray-address", nodes.address,
    ]  # fmt: skip
    code, said = run(*asked)

    assert code == 3, said
    assert "north: no image of" in said
    assert said.splitlines()[-1].endswith(
        "2 models trained, 1 failed: north; the same command again tries those alone"
    )
    names = {path.name for path in (tmp_path / "models").iterdir() if path.suffix != ".run"}
    assert names == {"east", "south"}
    assert read_bundle(tmp_path / "models" / "east").manifest.name == "east"
    assert "40 images: train" in (tmp_path / "models" / "east.run" / "log.txt").read_text()
    made = (tmp_path / "models" / "east" / "manifest.json").stat().st_mtime_ns

    for row, image in enumerate(images[40:80]):
        path = tmp_path / "cameras" / "north" / f"{row}.png"
        Image.fromarray(np.asarray(image)).save(path)
    code, said = run(*asked)

    assert (code, said.splitlines()) == (
        0,
        ["north: trained", f"{tmp_path}/models: 1 models trained"],
    )
    assert (tmp_path / "models" / "east" / "manifest.json").stat().st_mtime_ns == made
    assert run(*asked, "--ray-address", "127.0.0.1:1") == (
        0,
        f"{tmp_path}/models: 0 models trained\n",
    )


def test_a_folder_without_folders_is_one_line(tmp_path):
    """Nothing to train one model each on."""
    code, said = run("train", "--per-folder", tmp_path, "--model", "vae", "--out", tmp_path / "x")
    assert (code, len(said.splitlines())) == (2, 1)
    assert "it has no sub-folders to train on" in said
