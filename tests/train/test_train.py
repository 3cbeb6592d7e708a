"""Training end to end on real images: a bundle comes out, a killed run goes on exactly."""

from __future__ import annotations

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

from anomalyd.detect.bundle import read_bundle
from anomalyd.detect.detector import Detector
from anomalyd.detect.runtime import Session
from anomalyd.errors import ExportError, TrainingError, UsageError
from anomalyd.sources import open_source
from anomalyd.train import checkpoint
from anomalyd.train.card import history_of
from anomalyd.train.commands import export, train
from anomalyd.train.data import dithered
from anomalyd.train.export import check_parity, to_onnx
from anomalyd.train.loop import fit
from anomalyd.train.models import build
from anomalyd.train.muon import Muon, orthogonalised
from anomalyd.train.recipe import Recipe, default_recipe, parse_recipe
from anomalyd.train.settings import TrainSettings
from anomalyd.train.splits import split

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

    for words in ("bits/dim", "exchangeable", "outlier from", "anomalyd train", "recipe.toml"):
        assert words in card


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


def test_no_epochs_make_the_bundle_anew(bundle, fixture_data, tmp_path):
    """--init BUNDLE --epochs 0 exports, fits and calibrates anew, and trains nothing."""
    data = str(fixture_data / "fashion-mnist")
    train(data=data, model=None, out=tmp_path / "again", init=bundle, epochs=0.0)
    again, before = read_bundle(tmp_path / "again"), read_bundle(bundle)

    assert again.read("weights.safetensors") == before.read("weights.safetensors")
    np.testing.assert_allclose(again.calibration.scores, before.calibration.scores, rtol=1e-4)
    assert again.read("recipe.toml") == before.read("recipe.toml")
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
    """Ctrl-C in the middle of training leaves a run that --resume finishes."""
    from anomalyd.train import loop

    step = loop._Run.train_step

    def interrupted(run: loop._Run) -> float:
        if run.step == 3:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(loop._Run, "train_step", interrupted)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(model="autoencoder", density="features = 4\nlatent = 4"))
    data = str(fixture_data / "fashion-mnist")
    with pytest.raises(KeyboardInterrupt):
        train(data=data, model=None, out=tmp_path / "x", recipe=recipe)
    monkeypatch.undo()

    assert "--resume" in capsys.readouterr().err
    assert train(data=data, model=None, out=tmp_path / "x", resume=True) == 0


def test_minutes_become_steps_that_a_resumed_run_keeps(fixture_data, tmp_path):
    """--minutes is timed once; the budget stands in the checkpoint."""
    images = np.stack([i.payload for i in open_source(fixture_data / "mnist", split="test")])
    pixels = images.reshape(-1, 28, 28, 1)
    splits = split(np.arange(len(pixels), dtype=np.uint64), [None] * len(pixels))
    recipe = parse_recipe(RECIPE.format(model="vae", density=SMALL["vae"]), "r")
    from anomalyd.images import ImageSpec

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


@pytest.mark.parametrize(("dither", "odds"), [(False, 0.0), (True, 0.25)])
def test_dithered_training_learns_how_near_a_value_is_to_each_level(dither, odds, tmp_path):
    """A grey below the threshold is white a quarter of the time, and without dithering never."""
    from anomalyd.images import ImageSpec

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


def test_wrong_graph_is_not_exported(bundle):
    """A graph whose scores differ from torch's by more than 1e-5 bits/dim is an ExportError."""
    content = read_bundle(bundle)
    recipe = parse_recipe(content.read("recipe.toml").decode(), "recipe.toml")
    torch.manual_seed(1)
    other = build("vae", content.manifest.image, recipe.density)

    with pytest.raises(ExportError, match="bits/dim"):
        check_parity(other, content.model, content.golden.images)


@pytest.mark.parametrize("model", SMALL)
def test_graph_equals_torch_on_grey_and_colour(model):
    """onnxruntime gives what torch gives, for any number of images, and keeps causality."""
    from anomalyd.images import ImageSpec

    options = parse_recipe(RECIPE.format(model=model, density=SMALL[model]), "r").density
    density = build(model, ImageSpec(9, 8, 3), options)
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 8, 3), dtype=np.uint8)
    graph = to_onnx(density)
    parity = check_parity(density, graph, images)

    assert parity <= 1e-5
    if model == "gated-pixelcnn":
        session = Session(graph, device="cpu", threads=1)
        before = session.run(images[:1], nll_map=True).nll_map.ravel()
        for t in (0, 17, 40, 71):
            changed = images[:1].copy()
            changed[0, t // 8, t % 8] ^= 0x55
            moved = session.run(changed, nll_map=True).nll_map.ravel() != before
            assert not moved[:t].any()


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
        ({"model": "pixelcm"}, "no such model"),
        ({"model": None}, "--model NAME"),
        ({"minutes": 1.0, "epochs": 1.0}, "contradict"),
        ({"resume": True}, "no interrupted run"),
        ({"recipe": Path("absent.toml")}, "cannot be read"),
        ({"image_size": 3}, "4x4"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, words, fixture_data, tmp_path):
    """What cannot be meant is told before any work, with the way out."""
    given = {"data": str(fixture_data / "mnist"), "model": "vae", "out": tmp_path / "x"}
    with pytest.raises(UsageError, match=words) as caught:
        train(**(given | arguments))

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


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
    ],
)
def test_unknown_recipe_key_names_the_nearest(text, words, fixture_data, tmp_path):
    """A misspelt key is an error, not a silently ignored setting."""
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        train(data=str(fixture_data / "mnist"), model=None, out=tmp_path / "x", recipe=path)


def test_damaged_checkpoint_is_one_line(tmp_path):
    """A checkpoint of nonsense is a TrainingError that says what to remove."""
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="remove"):
        checkpoint.load(path, {}, [])


def test_every_model_has_a_recipe():
    """The table of models and the recipes that ship agree."""
    from anomalyd.train.models import MODELS

    assert all(isinstance(default_recipe(name), Recipe) for name in MODELS)
