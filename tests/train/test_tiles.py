"""Photographs of many sizes, from training on crops to verdicts, maps and the daemon."""

from __future__ import annotations

import base64
import csv
import io
import json
import os

import numpy as np
import pytest
import torch
from daemons import serve
from PIL import Image

from anomalyd import Detector
from anomalyd.cli import main
from anomalyd.detect.bundle import read_bundle
from anomalyd.errors import SourceError, TrainingError, UsageError
from anomalyd.images import ImageSpec
from anomalyd.sources import open_source
from anomalyd.train import loop
from anomalyd.train.commands import export, train
from anomalyd.train.compose import compose
from anomalyd.train.data import Photographs, gather, per_tile, reopen
from anomalyd.train.models import build
from anomalyd.train.recipe import parse_recipe
from anomalyd.train.splits import split

RECIPE = """
model = "gated-pixelcnn"
[image]
height = 12
width = 12
on_mismatch = "tile"
shrink = 2
[density]
features = 4
dilations = [1]
pixel = "hierarchical"
[train]
epochs = 1.0
batch_size = 16
evaluations = 2
checkpoint_seconds = 0.0
"""


@pytest.fixture(scope="module")
def photographs(fixture_data, tmp_path_factory):
    """Thirty mosaics of clothes, 56 to 112 pixels a side, two of each of fifteen objects."""
    root = tmp_path_factory.mktemp("photographs")
    source = open_source(fixture_data / "fashion-mnist", split="train")
    shirts = np.stack([item.payload.reshape(28, 28) for item in source])
    rng = np.random.default_rng(0)
    rows = []
    for number in range(30):
        down, across = rng.integers(2, 5, 2)
        chosen = shirts[rng.integers(0, len(shirts), (down, across))]
        name = f"{number:02d}.png"
        Image.fromarray(np.block([[*row] for row in chosen])).save(root / name)
        rows.append((name, f"object-{number // 2}"))
    with (root / "objects.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "object"), *rows])
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def bundle(photographs, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "mosaics"
    group = f"{photographs / 'objects.csv'}:object"
    assert train(data=str(photographs), model=None, out=out, recipe=recipe, group=group) == 0
    return out


def test_a_bundle_of_photographs_scores_maps_and_explains(bundle, photographs, tmp_path, capsys):
    """`score` takes every size, writes an overlay of that size, and names what is too small."""
    small = tmp_path / "small.png"
    Image.fromarray(np.zeros((23, 80), np.uint8)).save(small)
    maps = tmp_path / "maps"
    given = [str(photographs), str(small)]
    code = main(
        ["score", str(bundle), *given, "--format", "jsonl", "--heatmaps", str(maps), "--flips"]
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 3
    assert "tiles of 24x24" in rows[-1]["error"]
    assert {row["score_name"] for row in rows[:-1]} == {"texture"}
    assert len(list(maps.glob("*.png"))) == 30
    assert main(["score", str(bundle), given[0], "--flips"]) == 2


def test_python_batch_and_daemon_say_the_same(bundle, photographs, capsys):
    """One photograph through Detector.score, `score` and POST /v1/score with its heat map."""
    path = photographs / "03.png"
    verdict = Detector.load(bundle, device="cpu").score(path)
    main(["score", str(bundle), str(path), "--format", "jsonl"])
    row = json.loads(capsys.readouterr().out)
    daemon, url = serve(bundle), "/v1/score?heatmap=1&explain=1"
    small = io.BytesIO()
    Image.new("L", (23, 24)).save(small, "PNG")
    answer = daemon.score(path.read_bytes(), url)
    refused = daemon.score(small.getvalue(), url)
    (result,) = answer.json()["results"]
    for name in ("score", "p_value", "bits_per_dim"):
        assert row[name] == pytest.approx(getattr(verdict, name))
        assert result[name] == pytest.approx(getattr(verdict, name))
    picture = io.BytesIO(base64.b64decode(result["heatmap"]))
    with Image.open(picture) as drawn, Image.open(path) as native:
        assert drawn.size[1] % native.size[1] == 0
    assert refused.status_code == 422
    daemon.models.close()


def test_splits_keep_objects_of_a_table_together(photographs, bundle, tmp_path):
    """No object has a photograph that calibrates and one that trains."""
    content = read_bundle(bundle)
    source = open_source(photographs, group=f"{photographs / 'objects.csv'}:object")
    gather(source, content.manifest.image, tmp_path)
    images = reopen(tmp_path)
    assert images.groups == [f"object-{number // 2}" for number in range(30)]
    object_of = dict(zip(images.hashes.tolist(), images.groups, strict=True))
    calibrating, training = (
        {object_of[each] for each in hashes.tolist()}
        for hashes in (content.calibration.calibration_hashes, content.calibration.training_hashes)
    )
    assert not calibrating & training
    assert calibrating | training == set(images.groups)
    assert calibrating


def test_tables_that_do_not_fit_are_told(photographs, tmp_path):
    """A missing file, column or row: one line each."""
    with pytest.raises(UsageError, match="cannot be read"):
        list(open_source(photographs, group=f"{tmp_path / 'none.csv'}:object"))
    with pytest.raises(UsageError, match="no such column; it has file, object"):
        list(open_source(photographs, group=f"{photographs / 'objects.csv'}:thing"))
    short = photographs / "short.csv"
    short.write_text("file,object\n00.png,a\n")
    with pytest.raises(SourceError, match=r"it has no object for 01\.png"):
        list(open_source(photographs, group=f"{short}:object"))
    os.remove(short)


def test_calibrate_renews_the_promise_and_the_sizes(bundle, photographs, tmp_path, capsys):
    """On new photographs the table and the range of tiles are theirs; --refit is refused."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    for path in sorted(photographs.glob("*.png"))[:12]:
        with Image.open(path) as opened:
            image = np.asarray(opened)
        Image.fromarray(np.ascontiguousarray(image[::-1, :50])).save(fresh / path.name)
    assert main(["calibrate", str(copy), str(fresh)]) == 0
    tiles = read_bundle(copy).calibration.tiles
    assert len(tiles) == 12
    assert tiles[-1] < read_bundle(bundle).calibration.tiles[-1]
    assert main(["score", str(copy), str(photographs / "03.png")]) == 0
    assert main(["calibrate", str(copy), str(fresh), "--refit"]) == 2
    capsys.readouterr()
    assert main(["score", str(copy), *map(str, photographs.glob("*.png"))]) == 0
    assert "smaller or larger than any" in capsys.readouterr().err


def test_export_again_gives_the_same_scores(bundle, photographs):
    """The texture stays, and so do the verdicts."""
    path = photographs / "05.png"
    before = Detector.load(bundle, device="cpu").score(path)
    assert export(bundle) == 0
    assert Detector.load(bundle, device="cpu").score(path).score == pytest.approx(before.score)


def test_a_resumed_run_cuts_the_same_crops(photographs, tmp_path, monkeypatch):
    """Stopped in the middle and resumed: the weights of a run that was left alone."""
    recipe = parse_recipe(RECIPE, "recipe")
    spec = ImageSpec(channels=1, **recipe.image)
    gather(open_source(photographs), spec, tmp_path)
    images = reopen(tmp_path)
    splits = split(images.hashes, images.groups)

    def run(name, *, resume=False):
        torch.manual_seed(0)
        model = build(recipe.model, spec, recipe.density)
        (tmp_path / name).mkdir(exist_ok=True)
        cpu = torch.device("cpu")
        given = (model, images.pixels, splits, recipe.train, tmp_path / name)
        loop.fit(*given, device=cpu, resume=resume)
        return torch.cat([p.flatten() for p in model.parameters()])

    step = loop._Run.train_step

    def interrupted(run):
        if run.step == 7:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(loop._Run, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.undo()
    assert torch.equal(run("stopped", resume=True), run("whole"))


def test_crops_are_tiles_of_their_photographs(photographs, tmp_path):
    """Each crop is cut anywhere inside its photograph; larger photographs give more of them."""
    spec = ImageSpec(12, 12, 1, on_mismatch="tile")
    gather(open_source(photographs), spec, tmp_path)
    pixels = reopen(tmp_path).pixels
    assert isinstance(pixels, Photographs)
    rows = np.array([4, 4, 9])
    crops = pixels.crops(rows, [0, 0, 1])
    assert (crops == pixels.crops(rows, [0, 0, 1])).all()
    assert (crops != pixels.crops(rows, [0, 0, 2])).any()
    for row, crop in zip(rows, crops, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(pixels[row][..., 0], (12, 12))
        assert (windows == crop[..., 0]).all(axis=(2, 3)).any()
    often = np.bincount(per_tile(pixels, np.arange(30)), minlength=30)
    areas = np.array([h * w for h, w, _ in pixels.shapes])
    assert (often == np.round(areas / 144)).all()


@pytest.mark.parametrize("model", ["vae"])
def test_a_density_without_expectations_is_refused_before_it_trains(photographs, tmp_path, model):
    """What a photograph is scored by must be there."""
    with pytest.raises(UsageError, match="take a PixelCNN"):
        train(
            data=str(photographs),
            model=model,
            out=tmp_path / "x",
            image_size=24,
            on_mismatch="tile",
        )


def test_a_density_of_photographs_with_classes_is_refused_before_it_trains(tmp_path):
    """The texture that scores photographs knows no classes, and no hour is spent to find out."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (40, 40)).save(tmp_path / "data" / name / "0.png")
    given = {"data": str(tmp_path / "data"), "model": "gated-pixelcnn", "out": tmp_path / "x"}
    with pytest.raises(UsageError, match="knows no classes; leave --labels out") as caught:
        train(**given, labels=True, image_size=12, on_mismatch="tile")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.run").exists()


def test_a_density_of_photographs_is_not_composed(bundle, tmp_path):
    """Its score knows no classes, and a classifier beside it would not change that."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels)
    out = tmp_path / "classifier"
    train(data=str(tmp_path / "data.npz"), model="classifier", out=out, labels=True, epochs=0.1)
    with pytest.raises(UsageError, match="texture, which knows no classes") as caught:
        compose(out, bundle, out=tmp_path / "x", data=None, licence=None)
    assert "\n" not in str(caught.value)


def test_a_tile_larger_than_every_photograph_is_told(photographs, recipe, tmp_path):
    """Nothing can be used, and the first reason is named."""
    with pytest.raises(TrainingError, match=r"could be used; the first says: .*tiles of 400x400"):
        train(data=str(photographs), model=None, out=tmp_path / "x", recipe=recipe, image_size=200)
    assert not (tmp_path / "x").exists()
