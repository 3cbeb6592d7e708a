"""Training end to end on real images: a bundle comes out, a killed run goes on exactly."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import inspect
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load as parse

from anomalyd.density.companions import Companions
from anomalyd.detect.bundle import read_bundle, write_bundle
from anomalyd.detect.detector import Detector
from anomalyd.detect.runtime import Session
from anomalyd.errors import BundleError, ExportError, TrainingError, UsageError
from anomalyd.images import ImageSpec
from anomalyd.sources import open_source
from anomalyd.train import bundling, checkpoint, loop
from anomalyd.train.bundling import sample_count
from anomalyd.train.card import history_of
from anomalyd.train.commands import _image_spec, export, train
from anomalyd.train.data import TrainingData, classes_of, dithered, excluded, gather
from anomalyd.train.export import check_parity, to_onnx
from anomalyd.train.loop import fit
from anomalyd.train.models import MODELS, assemble, build
from anomalyd.train.muon import Muon, orthogonalised
from anomalyd.train.recipe import Recipe, default_recipe, parse_recipe
from anomalyd.train.report import Strange, write_strangest
from anomalyd.train.settings import TrainSettings
from anomalyd.train.splits import split
from anomalyd.train.weights import round_trained, start_from, unpack_weights

RECIPE = """
model = "{model}"
[density]
{density}
[train]
epochs = 1.0
batch_size = 32
learning_rate = 0.01
checkpoint_seconds = 0.0
"""
# A sampler of logistic mixtures takes twice as long to export.
VAE = "features = 4\nlatent = 4\npixel = 'hierarchical'"
SMALL = {
    "vae": "features = 4\nlatent = 4\ncomponents = 2",
    "gated-pixelcnn": "features = 8\ndilations = [1, 2]\npixel = 'logistic-mixture'",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(RECIPE.format(model="vae", density=VAE))
    return path


@pytest.fixture(scope="module")
def bundle(fixture_data, recipe, tmp_path_factory) -> Path:
    """A small VAE of the fixture's Fashion-MNIST."""
    out = tmp_path_factory.mktemp("trained") / "clothes"
    code = train(
        data=str(fixture_data / "fashion-mnist"), model=None, out=out, recipe=recipe, epochs=12.0
    )
    assert code == 0
    return out


@pytest.fixture(scope="module")
def more(bundle, fixture_data, tmp_path_factory) -> Path:
    """The same model a step further, a hundred of the images left out."""
    folder, data = tmp_path_factory.mktemp("more"), fixture_data / "fashion-mnist"
    names = [f"{i.source}#{i.index}" for i in open_source(data, split="train")]
    listing, out = folder / "exclude.csv", folder / "more"
    listing.write_text("image,p_value\n" + "\n".join(f"{name},0.01" for name in names[:100]))
    train(data=str(data), model=None, out=out, init=bundle, epochs=0.01, exclude=listing)
    return out


def test_training_writes_a_bundle_that_scores(bundle, fixture_data):
    """The new bundle verifies, knows its test bits/dim and gives p-values to unseen images."""
    detector = Detector.load(bundle, threads=1)
    images = [item.payload for item in open_source(fixture_data / "fashion-mnist", split="test")]
    verdicts = detector.score(images[:20])

    assert detector.manifest.bits_per_dim["test"] > 0
    assert detector.manifest.calibration_n == 99
    assert all(0 < verdict.p_value <= 1 for verdict in verdicts)


def test_run_folder_keeps_the_report_and_no_image_copy(bundle):
    """What stays beside the bundle: history and the strangest normals; the pixels are gone."""
    folder = bundle.with_name("clothes.run")

    assert {path.name for path in folder.iterdir()} >= {
        "history.csv",
        "strangest.csv",
        "strangest.png",
    }
    assert not (folder / "pixels.npy").exists()
    assert len((folder / "strangest.csv").read_text().splitlines()) == 21


def test_card_names_the_data_the_promise_and_the_command(bundle):
    """A reader of the card learns what it may trust and how to make it again."""
    card = (bundle / "CARD.md").read_text()

    for words in (
        "bits/dim",
        "exchangeable",
        "What `anomalyd sample -n 16` draws",
        "outlier from",
        "anomalyd train",
        "recipe.toml",
    ):
        assert words in card


@pytest.mark.parametrize(
    ("shape", "count"),
    [((28, 28, 1), 16), ((4, 4, 3), 16), ((32, 32, 1), 16), ((32, 32, 3), 4), ((64, 64, 3), 4)],
)
def test_the_card_shows_fewer_images_where_each_takes_long_to_draw(shape, count):
    """Sixteen, but four of many values where all are drawn anew until the last is done."""
    assert sample_count(ImageSpec(*shape), ["sampler.onnx"]) == count
    assert sample_count(ImageSpec(*shape), ["sampler.onnx", "row.onnx", "step.onnx"]) == 16


def test_splits_in_the_bundle_are_disjoint(bundle):
    """No calibration image is among those that training has seen."""
    calibration = read_bundle(bundle).calibration

    shared = np.intersect1d(calibration.training_hashes, calibration.calibration_hashes)
    assert len(shared) == 0


def test_export_again_changes_no_score(bundle, capsys):
    """`anomalyd export` writes the graph anew from the weights; golden scores hold."""
    before = read_bundle(bundle)
    assert export(bundle) == 0
    after = read_bundle(bundle)

    assert "exported again" in capsys.readouterr().err
    new = Session(after.model, device="cpu", threads=1).run(before.golden.images)
    np.testing.assert_allclose(new.log_likelihood, before.golden.log_likelihood, rtol=1e-6)


def test_a_bundle_does_not_wait_for_its_picture(
    bundle, fixture_data, tmp_path, monkeypatch, capsys
):
    """Where drawing takes too long, there is none, and the card does not speak of it."""
    monkeypatch.setattr(bundling, "DRAWING_SECONDS", 0.0)
    data = str(fixture_data / "fashion-mnist")
    train(data=data, model=None, out=tmp_path / "plain", init=bundle, epochs=0.0)
    assert "no picture of samples: drawing takes longer than 0 seconds" in capsys.readouterr().err
    files = read_bundle(tmp_path / "plain").manifest.files
    assert "sampler.onnx" in files
    assert "samples.png" not in files
    assert "samples.png" not in (tmp_path / "plain" / "CARD.md").read_text()


def test_recipe_of_a_bundle_reads_back(bundle):
    """recipe.toml in a bundle is complete: size, density, settings."""
    recipe = parse_recipe(read_bundle(bundle).read("recipe.toml").decode(), "recipe.toml")

    assert recipe.image["height"] == 28
    assert recipe.density["latent"] == 4
    assert parse_recipe(recipe.to_toml(), "again") == recipe


def test_init_starts_from_the_weights_of_a_bundle(bundle, more):
    """`--init BUNDLE` begins where the bundle stands: one step later it is still as good."""
    old, new = (read_bundle(path).manifest.bits_per_dim["test"] for path in (bundle, more))

    assert new < old + 0.2


def test_excluded_images_are_left_out(bundle, more):
    """Names of a strangest.csv given to --exclude do not train."""
    before, after = (read_bundle(path).calibration for path in (bundle, more))
    all_images, kept = (
        len(calibration.training_hashes) + len(calibration.calibration_hashes)
        for calibration in (before, after)
    )

    assert kept <= all_images - 100


def test_a_listing_may_have_names_with_commas_and_tells_of_those_it_misses(tmp_path, capsys):
    """In a strangest.csv and in a plain list commas are read; what names no image is counted."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a,b.png", "c.png", "d,e.png", "f.png"):
        Image.new("L", (8, 8)).save(folder / name)
    listed = [Strange(f"{folder}/{name}", 0.01, 3.0) for name in ("a,b.png", "gone.png")]
    table, _ = write_strangest(tmp_path, listed, [np.zeros((8, 8, 1), np.uint8)] * 2)
    with table.open("a") as file:
        file.write(f"{folder}/d,e.png\n\n{folder}/c.png\n")
    source = open_source(folder)
    kept = gather(source, ImageSpec(8, 8, 1), tmp_path, exclude=excluded(table))

    assert kept.names == [f"{folder}/f.png"]
    said = capsys.readouterr().err
    assert said.startswith("--exclude: 1 of 4 names are of no image of")
    assert said.count("\n") == 1


def test_companions_join_a_density_that_stays_as_it_was(bundle, fixture_data, tmp_path):
    """With main frozen only the companion learns; log p(x) stays."""
    beside = RECIPE.format(model="vae", density=VAE)
    beside = beside.replace(
        "[train]", '[local]\nfeatures = 4\nblocks = 0\n[train]\nfrozen = ["main"]'
    )
    (tmp_path / "recipe.toml").write_text(beside)
    code = train(
        data=str(fixture_data / "fashion-mnist"),
        model=None,
        out=tmp_path / "joined",
        recipe=tmp_path / "recipe.toml",
        init=bundle,
        epochs=0.5,
    )
    joined, alone = read_bundle(tmp_path / "joined"), read_bundle(bundle)

    assert code == 0
    assert joined.manifest.score_name == "nearest_normals"
    assert [*alone.manifest.statistics, "local_nll", "local_excess", "nll_over_local"] == list(
        joined.manifest.statistics
    )
    np.testing.assert_allclose(
        joined.golden.log_likelihood, alone.golden.log_likelihood, rtol=1e-5
    )
    card = joined.read("CARD.md").decode()
    assert " of the weights it started from" in card
    assert "of the companions together; the density was frozen |" in card
    assert "the settings of this last part, not of the weights" in card


def test_a_score_need_not_read_codes(bundle, fixture_data, tmp_path):
    """With codes = false a bundle with an encoder rests on its statistics alone, made anew or not.

    Where there are classes that is refused, before any work.
    """
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(model="vae", density=VAE) + "codes = false\n")
    given = {"data": str(fixture_data / "fashion-mnist"), "model": None, "recipe": path}
    train(**given, out=tmp_path / "plain", init=bundle, epochs=0.0)
    plain = read_bundle(tmp_path / "plain")

    assert read_bundle(bundle).manifest.score_name == "nearest_normals"
    assert plain.manifest.score_name == "density_of_states"
    assert plain.calibration.fit_codes is None
    assert "`density_of_states`" in plain.read("CARD.md").decode()
    with pytest.raises(UsageError, match="codes = false is for bundles without classes"):
        train(**given, out=tmp_path / "classes", labels=True)
    assert not (tmp_path / "classes.run").exists()


def test_half_precision_halves_a_bundle(bundle, fixture_data, tmp_path):
    """With half = true weights are those that two bytes hold, and files are half as large.

    What is computed from them is float32: the bundle verifies, and exports to the same graph.
    """
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(model="vae", density=VAE) + "half = true\n")
    given = {"data": str(fixture_data / "fashion-mnist"), "model": None, "recipe": path}
    train(**given, out=tmp_path / "half", init=bundle, epochs=0.1)
    whole, half = read_bundle(bundle), read_bundle(tmp_path / "half")
    stored = parse(half.read("weights.safetensors"))

    weights = unpack_weights(half.read("weights.safetensors"), "half")
    trained = {name: w for name, w in weights.items() if name != "noise"}
    assert all(torch.equal(w.half().float(), w) for w in trained.values())
    assert {stored[name].dtype for name in trained} == {torch.float16}
    assert {w.dtype for w in weights.values()} == {torch.float32}
    graph = half.model
    assert len(graph) < len(whole.model)
    assert export(tmp_path / "half") == 0
    assert read_bundle(tmp_path / "half").model == graph


def test_only_what_is_trained_is_rounded_to_half_precision():
    """Frozen weights stay as they are, and so does a tensor with a number beyond the range."""
    density = build("gated-pixelcnn", ImageSpec(8, 8, 1), {"features": 4})
    layers = list(density.layers)
    layers[0].requires_grad_(False)
    with torch.no_grad():
        layers[1].out.weight[0, 0] = 1e5
    before = {name: w.clone() for name, w in density.state_dict().items()}
    round_trained(density)

    kept = {name for name, w in density.state_dict().items() if torch.equal(w, before[name])}
    assert kept >= {n for n in before if n.startswith("layers.0")} | {"layers.1.out.weight"}
    assert "layers.2.out.weight" not in kept
    after = density.layers[2].out.weight
    torch.testing.assert_close(after, before["layers.2.out.weight"], rtol=2**-11, atol=2**-25)


def test_a_graph_in_half_precision_computes_what_it_did(monkeypatch):
    """Two bytes a weight or four, onnxruntime gives the same numbers to the last bit."""
    density = build("gated-pixelcnn", ImageSpec(8, 8, 1), {"features": 32})
    round_trained(density)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    half = to_onnx(density)
    monkeypatch.setattr("anomalyd.train.export.WORTH_HALVING", math.inf)
    whole = to_onnx(density)
    ours, usual = (Session(g, device="cpu", threads=1).run(images) for g in (half, whole))

    assert len(half) < 0.7 * len(whole)
    assert np.array_equal(ours.log_likelihood, usual.log_likelihood)
    assert np.array_equal(ours.statistics, usual.statistics)


def test_no_epochs_make_the_bundle_anew(bundle, fixture_data, tmp_path):
    """--init BUNDLE --epochs 0 exports, fits and calibrates anew, and trains nothing."""
    data, before = str(fixture_data / "fashion-mnist"), read_bundle(bundle)
    files = {name: before.read(name) for name in before.manifest.files}
    licensed = dataclasses.replace(before.manifest, licence="ours")
    write_bundle(tmp_path / "ours", licensed, files)
    train(data=data, model=None, out=tmp_path / "again", init=tmp_path / "ours", epochs=0.0)
    again = read_bundle(tmp_path / "again")

    assert again.read("weights.safetensors") == before.read("weights.safetensors")
    np.testing.assert_allclose(again.calibration.scores, before.calibration.scores, rtol=1e-4)
    assert again.read("recipe.toml") == before.read("recipe.toml")
    assert again.manifest.licence == "ours"
    cards = [history_of(each.read("CARD.md").decode()) for each in (again, before)]
    assert cards[0] == cards[1]


def killed_run(command: list[str], checkpoint_file: Path) -> None:
    """Start a training, kill it as soon as it has written a checkpoint."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        for _ in range(1200):
            if checkpoint_file.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read().decode()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()


def test_killed_training_resumes_to_the_same_weights(bundle, fixture_data, recipe, tmp_path):
    """SIGKILL half-way, --resume: the weights equal those of a run that was left alone."""
    data = str(fixture_data / "fashion-mnist")
    command = [sys.executable, "-m", "anomalyd", "train", data, "--recipe", str(recipe)]
    command += ["--epochs", "12", "--out", str(tmp_path / "killed")]
    killed_run(command, tmp_path / "killed.run" / "checkpoint.safetensors")
    assert not (tmp_path / "killed").exists()

    train(data=data, model=None, out=tmp_path / "killed", resume=True)

    killed, whole = (read_bundle(path) for path in (tmp_path / "killed", bundle))
    np.testing.assert_allclose(
        killed.golden.log_likelihood, whole.golden.log_likelihood, rtol=1e-6
    )


def test_interrupt_writes_a_checkpoint_and_says_how_to_go_on(
    fixture_data, tmp_path, monkeypatch, capsys
):
    """Ctrl-C in the middle of a step leaves a run of whole steps that --resume finishes."""
    step = loop._Run.train_step

    def interrupted(run: loop._Run) -> float:
        if run.step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(run)

    monkeypatch.setattr(loop._Run, "train_step", interrupted)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(model="autoencoder", density="features = 4\nlatent = 4"))
    data = str(fixture_data / "fashion-mnist")
    given = {"data": data, "model": None, "out": tmp_path / "x", "recipe": recipe}
    (tmp_path / "x.run").mkdir()
    (tmp_path / "x.run" / "history.csv").write_text("of an earlier run\n")
    with pytest.raises(KeyboardInterrupt):
        train(**given, seed=0)
    monkeypatch.undo()
    progress = checkpoint.load(tmp_path / "x.run" / "checkpoint.safetensors", {}, [])

    assert progress["step"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "--resume" in capsys.readouterr().err
    for other, words in (
        ({"seed": 3}, "--seed 3 comes too late, the run was started with 0"),
        ({"image_size": 14}, "--image-size 14 comes too late, the run was started without"),
        ({"data": str(fixture_data / "mnist")}, f"trains on {data}, not"),
    ):
        with pytest.raises(UsageError, match=words):
            train(**(given | other), resume=True)
    assert train(**given, seed=0, resume=True) == 0
    assert "earlier" not in (tmp_path / "x.run" / "history.csv").read_text()


def small_fit(
    folder: Path, pixels: np.ndarray, settings: TrainSettings, **options
) -> torch.Tensor:
    """Train a PixelCNN of images of a few pixels; return its weights."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = build("pixelcnn", ImageSpec(*pixels.shape[1:]), {"features": 4, "blocks": 0})
    splits = split(np.arange(len(pixels), dtype=np.uint64), [None] * len(pixels))
    fit(model, pixels, splits, settings, folder, device=torch.device("cpu"), **options)
    return torch.cat([weight.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("evaluations", [1, 4])
@pytest.mark.parametrize("moment", ["step", "validation"])
def test_an_interrupt_about_a_validation_skips_none(evaluations, moment, tmp_path, monkeypatch):
    """Stopped in the last step or the validation after it, it is resumed as if left alone."""
    pixels = np.random.default_rng(0).integers(0, 40, (60, 4, 4, 1), dtype=np.uint8)
    settings = TrainSettings(epochs=8.0, evaluations=evaluations)
    whole = small_fit(tmp_path / "whole", pixels, settings)
    step, rows_of = loop._Run.train_step, loop._Run.rows_of

    def interrupted_step(run: loop._Run) -> float:
        value = step(run)
        if moment == "step" and run.step == run.budget:
            signal.raise_signal(signal.SIGINT)
        return value

    def interrupted_rows(run: loop._Run, rows: np.ndarray, seed: list[int]) -> object:
        if moment == "validation" and run.step == run.budget:
            raise KeyboardInterrupt
        return rows_of(run, rows, seed)

    monkeypatch.setattr(loop._Run, "train_step", interrupted_step)
    monkeypatch.setattr(loop._Run, "rows_of", interrupted_rows)
    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path / "stopped", pixels, settings)
    monkeypatch.undo()
    resumed = small_fit(tmp_path / "stopped", pixels, settings, resume=True)

    assert torch.equal(resumed, whole)
    assert validations(tmp_path / "stopped") == validations(tmp_path / "whole")


def validations(folder: Path) -> list[list[str]]:
    """Step and loss of each row of history.csv, for times differ."""
    with (folder / "history.csv").open(newline="") as file:
        return [[row[0], row[-1]] for row in csv.reader(file)]


def test_a_resumed_run_writes_each_validation_once(tmp_path, monkeypatch):
    """Killed after a validation and before its checkpoint, it validates there again: one row."""
    pixels = np.random.default_rng(0).integers(0, 40, (60, 4, 4, 1), dtype=np.uint8)
    settings = TrainSettings(epochs=8.0, evaluations=4)
    small_fit(tmp_path / "whole", pixels, settings)

    def killed(run: loop._Run) -> None:
        raise RuntimeError("killed")

    def progress(step: int, **_: object) -> None:
        if step == 3:  # and no checkpoint after it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path / "killed", pixels, settings, progress=progress)
    monkeypatch.setattr(loop._Run, "save", killed)
    with pytest.raises(RuntimeError, match="killed"):
        small_fit(tmp_path / "killed", pixels, settings, resume=True)
    monkeypatch.undo()
    assert len(validations(tmp_path / "killed")) == 5
    small_fit(tmp_path / "killed", pixels, settings, resume=True)

    assert validations(tmp_path / "killed") == validations(tmp_path / "whole")


def test_validation_reads_all_of_its_split_evenly(tmp_path, monkeypatch):
    """Of more images than it reads it takes every second: data sorted by class lose none."""
    pixels = np.random.default_rng(0).integers(0, 40, (200, 4, 4, 1), dtype=np.uint8)
    monkeypatch.setattr(loop, "VALIDATION_IMAGES", 10)
    rows_of, seen = loop._Run.rows_of, []

    def watched(run: loop._Run, rows: np.ndarray, seed: list[int]) -> object:
        if seed[1] == 1:  # those of a validation
            seen.extend(rows.tolist())
        return rows_of(run, rows, seed)

    monkeypatch.setattr(loop._Run, "rows_of", watched)
    small_fit(tmp_path / "run", pixels, TrainSettings(epochs=0.1, evaluations=1))
    rows = split(np.arange(200, dtype=np.uint64), [None] * 200).validation

    assert len(rows) == 20
    assert seen == rows[::2].tolist()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    ("model", "frozen", "learns"),
    [
        ("classifier", ("encoder", "norm", "hidden"), "out."),
        ("pixelcnn", ("first", "blocks", "last"), "pixel."),
    ],
)
def test_a_readout_alone_trains(model, frozen, learns, optimizer, tmp_path):
    """A linear probe has no hidden kernel: what is not frozen learns, and nothing else."""
    settings = TrainSettings(frozen=frozen, optimizer=optimizer, epochs=1.0)
    classes = 2 if model == "classifier" else 0
    probe = assemble(Recipe(model, train=settings), ImageSpec(4, 4, 1), classes)
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 4, 4, 1), dtype=np.uint8)
    splits = split(np.arange(60, dtype=np.uint64), [None] * 60)
    labels = rng.integers(0, 2, 60) if classes else None
    cpu = torch.device("cpu")
    fit(probe, pixels, splits, settings, tmp_path, labels=labels, device=cpu)

    after = probe.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(learns) for name in changed)


def test_minutes_become_steps_that_a_resumed_run_keeps(fixture_data, tmp_path):
    """--minutes is timed once; the budget stands in the checkpoint."""
    images = np.stack([i.payload for i in open_source(fixture_data / "mnist", split="test")])
    pixels = images.reshape(-1, 28, 28, 1)
    splits = split(np.arange(len(pixels), dtype=np.uint64), [None] * len(pixels))
    recipe = parse_recipe(RECIPE.format(model="vae", density=SMALL["vae"]), "r")
    model = build("vae", ImageSpec(28, 28, 1), recipe.density)
    settings = TrainSettings(batch_size=32, evaluations=2)
    outcome = fit(
        model, pixels, splits, settings, tmp_path, device=torch.device("cpu"), minutes=0.02
    )
    progress = checkpoint.load(tmp_path / "checkpoint.safetensors", {}, [])

    assert progress["budget"] == outcome.budget >= 1
    assert outcome.steps == outcome.budget
    assert [outcome.machine] == progress["machines"]
    assert outcome.machine.endswith("core")


@given(levels=st.integers(2, 256), seed=st.integers(0, 9))
def test_dithering_draws_one_of_the_two_nearest_levels(levels, seed):
    """Each byte becomes one of a level next to it, and on average it stays what it was."""
    pixels = np.repeat(np.arange(256, dtype=np.uint8), 400)
    drawn = dithered(pixels, levels, [seed])
    level = drawn.astype(int) * levels // 256  # as a density quantises
    place = pixels.astype(float) * (levels - 1) / 255

    assert (np.abs(level - place) < 1 + 1e-4).all()
    means = level.reshape(256, 400).mean(axis=1)
    assert np.abs(means - place[::400]).max() < 5 * 0.5 / 400**0.5
    assert np.array_equal(drawn, dithered(pixels, levels, [seed]))
    if levels == 256:
        assert np.array_equal(drawn, pixels)


@pytest.mark.parametrize("levels", [2, 3, 255])
def test_dithering_keeps_black_and_white_whatever_is_drawn(levels, monkeypatch):
    """The largest number below one, which float32 rounds up beside a level, adds none to white."""

    class Highest:
        def random(self, shape, dtype):
            return np.full(shape, np.nextafter(np.float32(1), np.float32(0)), dtype)

    monkeypatch.setattr(np.random, "default_rng", lambda _: Highest())
    ends = np.array([0, 255], np.uint8)

    assert (dithered(ends, levels, [0]).astype(int) * levels // 256).tolist() == [0, levels - 1]


@pytest.mark.parametrize(("dither", "odds"), [(False, 0.0), (True, 0.25)])
def test_dithered_training_learns_how_near_a_value_is_to_each_level(dither, odds, tmp_path):
    """A grey below the threshold is white a quarter of the time, and without dithering never."""
    pixels = np.full((2_000, 4, 4, 1), 64, np.uint8)
    splits = split(np.arange(2_000, dtype=np.uint64), [None] * 2_000)
    recipe = {"features": 8, "blocks": 0, "kernel": 3, "pixel": "bernoulli"}
    torch.manual_seed(0)
    model = build("pixelcnn", ImageSpec(4, 4, 1, levels=2), recipe)
    settings = TrainSettings(epochs=6.0, dither=dither, adamw_learning_rate=0.02)
    fit(model, pixels, splits, settings, tmp_path, device=torch.device("cpu"))
    with torch.no_grad():
        table = model.log_probs(torch.zeros(1, 4, 4, 1, dtype=torch.uint8)).exp()

    assert table[0, 0, 0, 0, 1].item() == pytest.approx(odds, abs=0.12)


def test_a_loss_beyond_return_ends_the_training(fixture_data, tmp_path):
    """No hours are spent on weights that are lost; the message says which rate was too high."""
    text = RECIPE.format(model="vae", density=SMALL["vae"]).replace("0.01", "100.0")
    (tmp_path / "recipe.toml").write_text(text)
    data, recipe = str(fixture_data / "fashion-mnist"), tmp_path / "recipe.toml"
    with pytest.raises(
        TrainingError, match=r"no training comes back; lower learning_rate \(100\)"
    ):
        train(data=data, model=None, out=tmp_path / "lost", recipe=recipe, epochs=50.0)
    assert not (tmp_path / "lost").exists()


def test_wrong_graph_is_not_exported(bundle):
    """A graph whose scores differ from torch's by more than 1e-5 bits/dim is an ExportError."""
    content = read_bundle(bundle)
    recipe = parse_recipe(content.read("recipe.toml").decode(), "recipe.toml")
    torch.manual_seed(1)
    other = build("vae", content.manifest.image, recipe.density)

    with pytest.raises(ExportError, match="bits/dim"):
        check_parity(other, content.model, content.golden.images)


def test_scores_that_are_no_numbers_are_not_exported(bundle):
    """A NaN is no small difference."""
    content = read_bundle(bundle)
    recipe = parse_recipe(content.read("recipe.toml").decode(), "recipe.toml")
    broken = build("vae", content.manifest.image, recipe.density)
    with torch.no_grad():
        next(broken.pixel.parameters()).fill_(torch.nan)

    with pytest.raises(ExportError, match="by nan bits/dim"):
        check_parity(broken, content.model, content.golden.images)


@pytest.mark.parametrize(
    ("model", "text"),
    [*SMALL.items(), ("gated-pixelcnn", "features = 8\nreadout = 6\nnearby = 2")],
)
def test_graph_equals_torch_on_grey_and_colour(model, text):
    """onnxruntime gives what torch gives, for any number of images, and keeps causality.

    A pixel that changes moves its own term of -log p(x), and none of an earlier pixel.
    """
    options = parse_recipe(RECIPE.format(model=model, density=text), "r").density
    torch.manual_seed(0)
    density = build(model, ImageSpec(9, 8, 3), options)
    with torch.no_grad():
        for parameter in density.parameters():  # some are zero at first
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 8, 3), dtype=np.uint8)
    graph = to_onnx(density)
    parity = check_parity(density, graph, images)

    assert parity <= 1e-5
    if model == "gated-pixelcnn":
        session = Session(graph, device="cpu", threads=1)
        pixels = np.arange(9 * 8)
        same = images[:1].repeat(len(pixels), axis=0)
        changed = same.copy()
        changed[pixels, pixels // 8, pixels % 8] ^= 0x55
        before, after = (session.run(x, nll_map=True).nll_map for x in (same, changed))
        moved = (before != after).reshape(len(pixels), -1)
        assert moved.diagonal().all()
        assert not np.tril(moved, -1).any()


def test_muon_step_is_orthogonal():
    """The update's singular values are pushed towards one, whatever the gradient's were."""
    torch.manual_seed(0)
    matrix = torch.randn(16, 40) @ torch.diag(torch.logspace(0, -1, 40))
    values = torch.linalg.svdvals(orthogonalised(matrix))

    assert values.min() > 0.5
    assert values.max() < 1.4


def test_muon_minimises():
    """A least-squares problem over a kernel is solved."""
    torch.manual_seed(0)
    target, weight = torch.randn(6, 3, 2, 2), torch.nn.Parameter(torch.zeros(6, 3, 2, 2))
    optimizer = Muon([weight], lr=0.3)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 200)
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()

    assert (weight - target).abs().max() < 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"model": "classifier", "labels": True, "priors": {"0": 0.8, "1": 0.2}},
            "heeds no other",
        ),
        ({"model": "pixelcm"}, "no such model"),
        ({"model": None}, "--model NAME"),
        ({"minutes": 1.0, "epochs": 1.0}, "contradict"),
        ({"resume": True}, "no interrupted run"),
        ({"recipe": Path("absent.toml")}, "cannot be read"),
        ({"image_size": 3}, "4x4"),
        ({"epochs": -2.0}, "epochs must be at least 0, not -2"),
        ({"epochs": math.nan}, "epochs must be at least 0, not nan"),
        ({"epochs": math.inf}, "epochs must be at most"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"minutes": 0.0}, "--minutes must be a positive number, not 0"),
        ({"minutes": math.nan}, "--minutes must be a positive number, not nan"),
        ({"minutes": math.inf}, "--minutes must be a positive number, not inf"),
        ({"labels": True, "priors": {"0": 2.0, "1": 0.5}}, "between 0 and 1"),
        ({"labels": True, "priors": {"0": 0.2, "1": 0.5}}, "sum to 1"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, words, fixture_data, tmp_path):
    """What cannot be meant is told before any work, with the way out."""
    given = {"data": str(fixture_data / "mnist"), "model": "vae", "out": tmp_path / "x"}
    with pytest.raises(UsageError, match=words) as caught:
        train(**(given | arguments))

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.run").exists()


def test_a_start_that_is_no_bundle_is_told_before_images_are_read(fixture_data, tmp_path):
    """--init nowhere leaves nothing behind that would stand in the way of the right one."""
    data, out = str(fixture_data / "mnist"), tmp_path / "x"
    with pytest.raises(BundleError, match="nowhere"):
        train(data=data, model="vae", out=out, init=tmp_path / "nowhere")

    assert not out.with_name("x.run").exists()


def test_a_run_that_fails_before_its_first_checkpoint_may_be_started_again(tmp_path):
    """One image cannot be split; the same command with more of them is not told to resume."""
    data, options = tmp_path / "data", {"model": "vae", "out": tmp_path / "x"}
    data.mkdir()
    Image.new("L", (8, 8)).save(data / "0.png")
    for _ in range(2):
        with pytest.raises(TrainingError, match="at least 8 independent images"):
            train(data=str(data), **options)
    with pytest.raises(UsageError, match="no interrupted run"):
        train(data=str(data), resume=True, **options)


def test_a_class_that_cannot_be_calibrated_is_told_before_it_trains(tmp_path):
    """Of a class of one image none is held out: that is said before anything is trained."""
    rng = np.random.default_rng(0)
    for label, count in (("common", 40), ("rare", 1)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{number}.png")
    with pytest.raises(TrainingError, match="calibration split has no image of rare"):
        train(data=str(tmp_path / "data"), model="vae", out=tmp_path / "x", labels=True, seed=1)

    assert not (tmp_path / "x.run" / "history.csv").exists()


def test_one_grey_image_among_coloured_ones_does_not_decide(tmp_path):
    """The first image is black, the second is red: the model sees colours."""
    for name, colour in (("0.png", "black"), ("1.png", "red")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / name)
    spec = _image_spec(open_source(tmp_path), {})
    (tmp_path / "1.png").unlink()

    assert (spec.height, spec.width, spec.channels) == (6, 8, 3)
    assert _image_spec(open_source(tmp_path), {}).channels == 1


def test_classes_stand_in_the_order_of_numbers_and_then_of_words():
    """10 comes after 9, words after all numbers, and a superscript is no number."""
    labels = ["10", "9", "bag", "²", "0"]
    zeros = np.zeros(5, np.uint64)
    images = TrainingData(zeros.astype(np.uint8), zeros, labels, [None] * 5, labels, [])

    assert classes_of(images)[0] == ["0", "9", "10", "bag", "²"]


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("gated-pixelcnn", {"features": -1}, "features must be a whole number of at least 1"),
        ("gated-pixelcnn", {"features": True}, "features must be a whole number"),
        ("gated-pixelcnn", {"dilations": [0]}, "dilations must be a list of whole numbers of at"),
        ("gated-pixelcnn", {"dilations": ["a"]}, "dilations must be a list"),
        ("gated-pixelcnn", {"dilations": []}, "dilations must be a list"),
        ("gated-pixelcnn", {"dilations": 2}, "dilations must be a list"),
        ("gated-pixelcnn", {"pixel": 3}, "pixel must be text"),
        ("gated-pixelcnn", {"readout": -1}, "readout must be a whole number of at least 0"),
        ("gated-pixelcnn", {"nearby": 4}, "nearby levels are read by hidden units"),
        ("gated-pixelcnn", {"pixel": "categorical", "readout": 4}, "categorical pixel has no rea"),
        ("pixelcnn", {"blocks": -1}, "blocks must be a whole number of at least 0"),
        ("pixelcnn++", {"blocks": [1, 1, -1]}, "blocks must be a list of whole numbers of at"),
        ("pixelcnn++", {"dropout": 1.0}, "dropout must be a number from 0 to less than 1"),
        ("classifier", {"dropout": math.nan}, "dropout must be a number"),
        ("classifier", {"shift": -1}, "shift must be a whole number of at least 0"),
        ("classifier", {"hidden": -1}, "hidden must be"),
        ("classifier", {"mirror": 1}, "mirror must be true or false"),
        ("vae", {"components": 0}, "components must be"),
        ("vae", {"latent": -1}, "latent must be"),
        ("autoencoder", {"outputs": 0}, "outputs must be"),
        ("vae", {"features": 10**17}, "^vae: "),
    ],
)
def test_impossible_options_end_in_one_line(model, options, words):
    """What a recipe's [density] cannot say is a usage error, and never torch's traceback."""
    classes = 2 if model == "classifier" else 0
    with pytest.raises(UsageError, match=words) as caught:
        build(model, ImageSpec(8, 8, 1), options, classes)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", MODELS)
def test_every_option_of_a_model_may_be_said(model):
    """Each default, written out as in a recipe, is a value that the option allows."""
    module, name = MODELS[model].split(":")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    options = {
        p.name: p.default for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    classes = 2 if model in ("classifier", "ccvae") else 0

    assert build(model, ImageSpec(8, 8, 1), options, classes).shape.height == 8


def test_an_option_of_a_companion_is_told_by_its_table():
    """What is wrong in [local] or [vae] is not said to stand in [density]."""
    for wrong, words in (
        ({"local": {"foo": 1}}, r"pixelcnn \[local\]: .*foo"),
        ({"local": {"features": 0}}, r"pixelcnn \[local\]: features must be"),
        ({"local": {}, "vae": {"featurs": 2}}, r"vae \[vae\]: .*featurs"),
    ):
        with pytest.raises(UsageError, match=words):
            assemble(Recipe("gated-pixelcnn", **wrong), ImageSpec(8, 8, 1))


def test_a_start_without_a_kernel_in_common_is_refused():
    """A bias of the right length is no start; a VAE beside another density is one for a VAE."""
    options = {"features": 4, "latent": 4, "components": 2}
    spec = ImageSpec(8, 8, 1)
    vae = build("vae", spec, options)
    weights = vae.state_dict()
    joined = Companions(build("vae", spec, options), build("pixelcnn", spec, {"blocks": 0}))

    with pytest.raises(TrainingError, match="no kernel of that bundle fits"):
        start_from(vae, {"decoder.start.bias": weights["decoder.start.bias"]})
    with pytest.raises(TrainingError, match="no kernel"):
        start_from(vae, {"noise": weights["noise"]})
    beside = {f"vae.{name}": value for name, value in weights.items()}
    assert start_from(joined, beside) == [f"main.{name}" for name in weights]
    assert torch.equal(joined.main.encoder.code.weight, vae.encoder.code.weight)


def test_existing_bundle_is_never_overwritten(bundle, fixture_data):
    """--out that exists is refused."""
    with pytest.raises(UsageError, match="exists"):
        train(data=str(fixture_data / "mnist"), model="vae", out=bundle)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = 'vae'\n[density]\nlatnet = 3", "nearest known one is latent"),
        ("model = 'vae'\n[train]\nepoch = 3", "nearest known one is epochs"),
        ("modl = 'vae'", "nearest known one is model"),
        ("model = 'vae'\n[image]\nhight = 3", "nearest known one is height"),
        ("model = ", "not TOML"),
        ("model = 'vae'\n[image]\nheight = 'tall'", "height must be a whole number, not 'tall'"),
        ("model = 'vae'\n[image]\nchannels = true", "channels must be a whole number, not True"),
        ("model = 'vae'\n[image]\nresize = []", "area or lanczos, not"),
        ("model = 'vae'\n[image]\non_mismatch = {}", "refuse, crop, resize or tile, not"),
        ("model = 'vae'\n[classifier]\nfeatures = 3", "anomalyd compose"),
    ],
)
def test_unknown_recipe_key_names_the_nearest(text, words, fixture_data, tmp_path):
    """A misspelt key is an error, not a silently ignored setting."""
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        train(data=str(fixture_data / "mnist"), model=None, out=tmp_path / "x", recipe=path)


def test_a_model_that_no_memory_holds_is_told_to_be_smaller(fixture_data, tmp_path):
    """When it is made, and when it first sees images: a line that says what to lower."""
    with pytest.raises(UsageError, match=r"vae: does not fit .* lower"):
        build("vae", ImageSpec(28, 28, 1), {"latent": 10**11})
    recipe = tmp_path / "recipe.toml"
    wide = "features = 4\ndilations = [1, 1000000]"
    recipe.write_text(RECIPE.format(model="gated-pixelcnn", density=wide))
    with pytest.raises(TrainingError, match=r"gated-pixelcnn: does not fit .* lower"):
        train(data=str(fixture_data / "mnist"), model=None, out=tmp_path / "x", recipe=recipe)


def test_damaged_checkpoint_is_one_line(tmp_path):
    """A checkpoint of nonsense is a TrainingError that says what to remove."""
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="remove"):
        checkpoint.load(path, {}, [])


def test_every_model_has_a_recipe():
    """The table of models and the recipes that ship agree."""
    assert all(isinstance(default_recipe(name), Recipe) for name in MODELS)
