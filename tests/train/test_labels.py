"""From labelled images to verdicts with a label or a reason, in both ways to p(x|y)."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from daemons import check_problem, encoded, serve

from anomalyd.cli import main
from anomalyd.detect.bayes import DOUBT
from anomalyd.detect.bundle import read_bundle, write_bundle
from anomalyd.detect.conformal import benjamini_hochberg, false_alarm_band, p_values
from anomalyd.detect.detector import Detector
from anomalyd.detect.manifest import dump_manifest
from anomalyd.errors import AlphaUnreachable, UsageError
from anomalyd.sources import open_source
from anomalyd.train.commands import export, train
from anomalyd.train.compose import compose
from anomalyd.train.recipe import recipe_of
from anomalyd.train.weights import unpack_weights

TRAIN = "[train]\nbatch_size = 32\ncheckpoint_seconds = 0.0\nepochs = 2.0\n"
SMALL = "features = 4\nlatent = 8\n"
CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def data(fixture_data) -> str:
    return str(fixture_data / "fashion-mnist")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("labels")


def made(model: str, data: str, folder: Path, density: str, more: str = "", **options) -> Path:
    recipe, out = folder / f"{model}.toml", folder / f"my-{model}"
    recipe.write_text(f'model = "{model}"\n[density]\n{density}{TRAIN}{more}')
    assert train(data=data, model=None, out=out, recipe=recipe, **options) == 0
    return out


@pytest.fixture(scope="module")
def bayes(data, folder) -> Path:
    """p(x|y) with a weight on the posterior."""
    folder = folder / "bayes"
    folder.mkdir()
    more = "bayes = 100.0\nshift = 1\nmirror = true\n"
    density = f"{SMALL}outputs = 4\ncomponents = 2\n"
    return made("vae", data, folder, density, more, labels=True)


@pytest.fixture(scope="module")
def parts(data, folder) -> tuple[Path, Path]:
    classifier = made("classifier", data, folder, f"{SMALL}hidden = 8\n", labels=True)
    return classifier, made("vae", data, folder, f"{SMALL}outputs = 4\npixel = 'hierarchical'\n")


@pytest.fixture(scope="module")
def labelled(data, folder, parts) -> Path:
    """p(x|y) around a classifier that was trained before and stays as it is."""
    density = f"{SMALL}outputs = 4\ncomponents = 2\nlabel_features = 4\n"
    density += "label_latent = 8\nlabel_hidden = 8\n"
    more = 'frozen = ["labeller"]\nbayes = 100.0\n'
    return made("ccvae", data, folder, density, more, labels=True, init=parts[0])


@pytest.fixture(scope="module")
def composed(parts, folder) -> Path:
    assert compose(*parts, out=folder / "composed", data=None, licence=None) == 0
    return folder / "composed"


@pytest.fixture(scope="module")
def images(data) -> np.ndarray:
    items = open_source(data, split="test")
    return np.stack([item.payload for item in items])[:40, ..., None]


@pytest.mark.parametrize("which", ["bayes", "labelled", "composed"])
def test_a_verdict_has_a_label_or_a_reason(which, images, request):
    """A posterior over all classes; null and a reason where rejected; novel is an outlier."""
    detector = Detector.load(request.getfixturevalue(which), threads=1)
    verdicts = detector.score(images, alpha=0.2)

    for verdict in verdicts:
        assert sum(verdict.posterior.values()) == pytest.approx(1)
        assert list(verdict.posterior) == CLASSES
        assert (verdict.label is None) == verdict.rejected == (verdict.reason is not None)
        assert (verdict.reason == "novel") == verdict.outlier == (verdict.p_value <= 0.2)
        if verdict.label is not None:
            assert verdict.label == max(verdict.posterior, key=verdict.posterior.get)
    assert {"label", "posterior", "rejected"} <= verdicts[0].to_dict().keys()


def test_a_density_with_a_labeller_keeps_the_classifier_it_starts_from(labelled, parts):
    """Frozen by its dotted name, it has the classifier's weights when the rest was trained."""
    ours, theirs = (
        unpack_weights(read_bundle(path).read("weights.safetensors"), "")
        for path in (labelled, parts[0])
    )
    prefix = "labeller."
    kept = {n.removeprefix(prefix): w for n, w in ours.items() if n.startswith(prefix)}
    assert kept.keys() == theirs.keys()
    assert all(torch.allclose(kept[name], theirs[name]) for name in theirs)
    assert f"--init {parts[0]}" in read_bundle(labelled).read("CARD.md").decode()


def test_composition_keeps_the_density_and_the_classifier(composed, parts, images, capsys):
    """p(x) is the density's and the posterior, at temperature 1, the classifier's."""
    joined = Detector.load(composed, threads=1)
    density = Detector.load(parts[1], threads=1)
    raw, alone = joined.session.run(images), density.session.run(images)
    manifest, card = joined.manifest, read_bundle(composed).read("CARD.md").decode()

    np.testing.assert_allclose(joined.nll(raw), density.nll(alone), rtol=1e-6)
    assert manifest.statistics == [*density.manifest.statistics, "max_probability", "entropy"]
    assert manifest.priors == read_bundle(parts[0]).manifest.priors
    assert "accuracy is the classifier's" in " ".join(card.split())
    assert f"anomalyd compose {parts[0]} {parts[1]}" in card
    capsys.readouterr()
    assert main(["sample", str(composed)]) == 1
    said = capsys.readouterr().err
    assert "cannot be drawn; sample the density that it was made from" in said
    assert said.count("\n") == 1


def test_a_composed_bundle_exports_again(composed):
    """Its recipe and weights are enough: the same scores come out."""
    before = read_bundle(composed)
    before_weights = before.read("weights.safetensors")
    assert export(composed) == 0
    again = read_bundle(composed)

    np.testing.assert_allclose(again.golden.log_likelihood, before.golden.log_likelihood)
    assert again.read("weights.safetensors") == before_weights


def test_parts_that_do_not_go_together_are_refused(parts, bayes, tmp_path):
    """Wrong kinds, a density with classes: each in one line, and nothing is written."""
    classifier, density = parts
    out = tmp_path / "x"
    for given, says in (
        ((density, classifier), "give a classifier there"),
        ((classifier, classifier), "give a density there"),
        ((classifier, bayes), "classes of its own"),
    ):
        with pytest.raises(UsageError, match=says):
            compose(*given, out=out, data=None, licence=None)
    content = read_bundle(classifier)
    files = {name: content.read(name) for name in content.manifest.files}
    files["recipe.toml"] = files["recipe.toml"].replace(b"seed = 0", b"seed = 5")
    other = tmp_path / "other"
    write_bundle(other, content.manifest, files)
    with pytest.raises(UsageError, match="differ in their --seed"):
        compose(other, density, out=out, data=None, licence=None)
    assert not out.exists()


@pytest.fixture
def awkward(tmp_path, monkeypatch) -> dict[str, object]:
    """DATA and a list of images to leave out whose names have spaces; two classes."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("my data").mkdir()
    data = "my data/it's.npz"
    pixels = rng.integers(0, 60, (300, 8, 8), dtype=np.uint8)
    np.savez(data, images=pixels, labels=np.array(["a", "b b"])[rng.integers(0, 2, 300)])
    Path("left out.txt").write_text("".join(f"{data}#{row}\n" for row in range(20)))
    return {"data": data, "exclude": Path("left out.txt")}


def test_the_card_s_command_trains_the_same_again(awkward, tmp_path):
    """As a shell reads it: names with spaces, what was left out, and the priors given."""
    folder = tmp_path / "of mine"
    folder.mkdir()
    priors = {"a": 0.75, "b b": 0.25}
    first = made("vae", folder=folder, density=SMALL, labels=True, priors=priors, **awkward)
    card = read_bundle(first).read("CARD.md").decode()
    command = next(line for line in card.splitlines() if line.startswith("    anomalyd train"))
    assert main(shlex.split(command)[1:]) == 0
    before, again = read_bundle(first), read_bundle(Path("again"))

    assert again.manifest.data_digest == before.manifest.data_digest
    assert again.manifest.priors == before.manifest.priors == [0.75, 0.25]
    assert again.read("weights.safetensors") == before.read("weights.safetensors")


def test_parts_that_left_out_the_same_images_compose(awkward, tmp_path):
    """Their cards say which; gone, that is told. What is composed reads codes, and says so."""
    folder = tmp_path / "of mine"
    folder.mkdir()
    classifier = made("classifier", folder=folder, density=SMALL, labels=True, **awkward)
    density = made("vae", folder=folder, density=SMALL, more="codes = false\n", **awkward)
    given = {"data": None, "licence": None}
    awkward["exclude"].rename("moved.txt")
    with pytest.raises(UsageError, match=r"--exclude left out\.txt, and there is no such file"):
        compose(classifier, density, out=Path("joined"), **given)
    Path("moved.txt").rename("left out.txt")
    assert compose(classifier, density, out=Path("joined"), **given) == 0
    joined = read_bundle(Path("joined"))

    assert joined.manifest.data_digest == read_bundle(density).manifest.data_digest
    assert joined.manifest.priors == read_bundle(classifier).manifest.priors
    assert recipe_of(density).train.codes is False
    assert recipe_of(Path("joined")).train.codes is True
    card = joined.read("CARD.md").decode()
    assert shlex.join(["anomalyd", "compose", str(classifier), str(density)]) in card


def test_score_prints_labels_and_fdr_decides_what_is_novel(bayes, data, capsys):
    """jsonl has the contract's fields; with --fdr novel is the Benjamini-Hochberg decision."""
    assert main(["score", str(bayes), f"{data}:test", "--format", "jsonl", "--alpha", "0.3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all({"label", "posterior", "rejected", "reason"} <= row.keys() for row in rows)
    assert all((row["reason"] == "novel") == row["outlier"] for row in rows)

    assert main(["score", str(bayes), f"{data}:test", "--format", "jsonl", "--fdr", "0.9"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(
        (row["reason"] == "novel") == row["outlier"] == (row["q_value"] <= 0.9) for row in rows
    )
    q_values = benjamini_hochberg([row["p_value"] for row in rows])
    assert [row["q_value"] for row in rows] == pytest.approx(q_values)


def test_priors_and_costs_change_labels_and_no_score(bayes, images):
    """Where only class 3 occurs, nearly everything is 3; bits, scores and p-values stay."""
    detector = Detector.load(bayes, threads=1)
    plain = detector.score(images)
    priors = dict.fromkeys(CLASSES, 1e-9) | {"3": 1 - 9e-9}
    asked = detector.score(images, priors=priors, reject_cost=0.9)

    assert [v.score for v in asked] == [v.score for v in plain]
    assert [v.bits_per_dim for v in asked] == [v.bits_per_dim for v in plain]
    likeliest = [max(v.posterior, key=v.posterior.get) for v in asked]
    assert likeliest.count("3") > [max(v.posterior, key=v.posterior.get) for v in plain].count("3")
    assert not any(v.reason == "ambiguous" for v in asked)


def test_an_alpha_out_of_reach_names_the_rarest_class(bayes):
    """Alpha is bounded by the class with the fewest calibration images."""
    detector = Detector.load(bayes, threads=1)
    rarest = detector.classes[int(detector.calibration.class_counts.argmin())]
    with pytest.raises(AlphaUnreachable, match=f"class {rarest}: alpha 0.0001 needs 9999"):
        detector.alpha(0.0001)


def test_a_bundle_without_doubt_has_one_score_for_all_classes(bayes, images):
    """The key is optional, as bundles of before have none: then p is the score's own."""
    bundle = read_bundle(bayes)
    detector = Detector.load(bayes, threads=1)
    old = Detector(replace(bundle, manifest=replace(bundle.manifest, doubt=0.0)), detector.session)
    raw = old.run(images)
    tables = old.calibration.per_class()
    expected = np.max([p_values(old.scores(raw), *table) for table in tables], axis=0)

    assert bundle.manifest.doubt == DOUBT
    np.testing.assert_array_equal(old.columns(raw, 0.1).p_value, expected)
    assert (detector.columns(raw, 0.1).p_value <= expected).all()
    assert b"doubt" not in dump_manifest(old.manifest)


def test_calibrate_goes_class_by_class(bayes, data, tmp_path, capsys):
    """From labelled images each class gets its own ranks; without labels it is refused."""
    import shutil

    path = tmp_path / "mine"
    shutil.copytree(bayes, path)
    assert main(["calibrate", str(path), f"{data}:test"]) == 0
    after = read_bundle(path)
    assert after.calibration.class_counts.sum() == after.manifest.calibration_n == 200
    capsys.readouterr()
    assert main(["calibrate", str(path), "tests/fixtures/images"]) != 0
    assert "label" in capsys.readouterr().err


def test_evaluate_measures_labels_beside_a_baseline(
    bayes, parts, data, fixture_data, tmp_path, capsys
):
    """Accuracy by its definition, rates that add up, and the page that shows them."""
    page = tmp_path / "page.html"
    arguments = ["evaluate", str(bayes), "--normal", f"{data}:test", "--labels"]
    arguments += ["--outliers", f"mnist={fixture_data / 'mnist'}:test", "--format", "json"]
    arguments += ["--baseline", str(parts[0]), "--report", str(page), "--alpha", "0.2"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    found = printed["classification"]
    items = list(open_source(data, split="test", labels=True))
    detector = Detector.load(bayes, threads=1)
    verdicts = detector.score([item.payload for item in items], alpha=0.2)
    counts = detector.calibration.class_counts.tolist()
    widest = max(false_alarm_band(0.2, n, len(items))[1] for n in counts)
    right = [
        max(v.posterior, key=v.posterior.get) == i.label
        for v, i in zip(verdicts, items, strict=True)
    ]

    assert printed["false_alarm_rate"]["band"] == pytest.approx([0, widest], abs=1e-6)
    assert widest > false_alarm_band(0.2, sum(counts), len(items))[1]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["rejected"]["normal"]["rejected"] == pytest.approx(
        np.mean([v.rejected for v in verdicts])
    )
    assert set(found) >= {"nll", "ece", "aurc", "augrc", "coverage_at_1pct_risk", "baseline"}
    assert set(found["mixed"]) == set(found["baseline"]["mixed"]) == {"mnist"}
    assert set(found["classes"]) == set(CLASSES)
    text = page.read_text()
    assert "Labels, and images that get none" in text
    assert "my-classifier" in text
    assert "those of the rarest class" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--label-alpha", "2"], "between 0 and 1"),
        (["--prior", "3=0.5"], "none for 0"),
        (["--prior", "three"], "say NAME=P"),
        (["--reject-cost", "0"], "between 0 and 1"),
    ],
)
def test_impossible_wishes_end_in_one_line(bayes, arguments, says, capsys):
    assert main(["score", str(bayes), "tests/fixtures/images/boot.png", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_bundle_without_labels_refuses_to_give_any(parts, capsys):
    arguments = ["score", str(parts[1]), "tests/fixtures/images/boot.png", "--label-alpha", "0.1"]
    assert main(arguments) == 2
    assert "gives no labels" in capsys.readouterr().err


def test_the_daemon_gives_the_labels_that_python_gives(bayes, images):
    """Level, cost and priors in the query, or level and cost as parameters, mean the same."""
    detector = Detector.load(bayes, threads=1)
    daemon = serve(bayes)
    priors = dict.fromkeys(CLASSES, 0.02) | {"3": 0.82}
    wishes = {"priors": priors, "reject_cost": 0.5, "alpha": 0.2}
    query = [("prior", f"{name}={p}") for name, p in priors.items()]
    query += [("reject_cost", "0.5"), ("alpha", "0.2")]
    for pixels in images:
        answer = daemon.score(encoded(pixels), params=query).json()["results"][0]
        assert answer == {"index": 0, **detector.score(pixels, **wishes).to_dict()}

    call = {
        "parameters": {"label_alpha": 0.8},
        "inputs": [
            {
                "name": "pixels",
                "shape": list(images.shape),
                "datatype": "UINT8",
                "data": images.ravel().tolist(),
            }
        ],
    }
    found = daemon.ask("POST", "/v2/models/my-vae/infer", json=call).json()["outputs"]
    given = {output["name"]: output["data"] for output in found}
    asked = detector.score(images, label_alpha=0.8)
    assert given["label"] == [verdict.label or "" for verdict in asked]
    assert given["reason"] == [verdict.reason or "" for verdict in asked]
    assert asked != detector.score(images)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("label_alpha=2", "between 0 and 1"),
        ("reject_cost=x", "must be a number"),
        ("prior=3=0.5", "none for 0"),
        ("prior=three", "say NAME=P"),
        ("label=3", "there are alpha, label_alpha, reject_cost, prior, heatmap, explain"),
    ],
)
def test_the_daemon_refuses_impossible_wishes(bayes, images, query, says):
    answer = serve(bayes).score(encoded(images[0]), path=f"/v1/score?{query}")
    check_problem(answer, 400)
    assert says in answer.json()["detail"]


def test_the_daemon_gives_no_labels_where_the_bundle_has_none(parts, images):
    answer = serve(parts[1]).score(encoded(images[0]), path="/v1/score?label_alpha=0.1")
    check_problem(answer, 400)
    assert "gives no labels" in answer.json()["detail"]
