"""From trained weights to a bundle: export, check, calibrate on the exported graph, describe."""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import numpy as np

from anomalyd.density.base import Density
from anomalyd.detect import bundle as bundles
from anomalyd.detect import conformal, tiling
from anomalyd.detect.bayes import DOUBT, fit_temperature, log_posterior
from anomalyd.detect.pipeline import collect
from anomalyd.detect.ranks import ranks, ranks_by_class
from anomalyd.detect.runtime import CPU, CUDA, Raw, Session
from anomalyd.detect.sample import Sampler, grid
from anomalyd.detect.statistics import (
    BY_CLASS,
    BY_CODE,
    Fit,
    make_score,
    negative_log_likelihood,
)
from anomalyd.detect.texture import Field, Texture
from anomalyd.errors import SourceError
from anomalyd.sources import has_kinds, open_evaluation, open_source
from anomalyd.train import card, report
from anomalyd.train.data import crops, forget
from anomalyd.train.export import OPSET, TOLERANCE, check_parity, to_onnx, to_sampler, to_steps
from anomalyd.train.progress import counting, say
from anomalyd.train.splits import Splits
from anomalyd.train.weights import pack_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from anomalyd.density.base import Model
    from anomalyd.images import ImageSpec
    from anomalyd.train.data import TrainingData
    from anomalyd.train.loop import Outcome
    from anomalyd.train.recipe import Recipe

__all__ = ["SPLITS", "Trained", "class_shares", "graphs", "samples", "write"]

SPLITS = ("train", "validation", "fit", "calibration")
SCORE = "density_of_states"
"""What verdicts rest on without classes, where no codes are to be read."""
PARITY_IMAGES = 64
SAMPLED = 1 << 14  # values of the card's picture, at most, where all wait for the slowest
DRAWING_SECONDS = 180.0  # of the card's picture, for who waits for a bundle does not wait for it
FIT_PIXELS = 1 << 25
"""Pixels that a texture is fitted to, at most: some 300 MB."""
STRANGEST = 20
UNITS = {
    "log_likelihood": "nats",
    "log_posterior": "nats",
    "nll_map": "nats",
    "embedding": "1",
    "excess_map": "1",
}


@dataclass(frozen=True)
class Trained:
    """A model at the end of its training, and all that led there.

    Attributes:
        model: with the best weights, on the CPU.
        recipe: every setting, the epochs that were planned among them, by --minutes or not.
        spec: the images it takes.
        images: what it was trained on, decoded.
        splits: who saw which image.
        classes: names of the classes; empty without.
        labels: int64 (N,), the class of each image; None without.
        priors: p(y) of each class, given or counted in the training split; None without.
        outcome: how the run ended.
    """

    model: Model
    recipe: Recipe
    spec: ImageSpec
    images: TrainingData
    splits: Splits
    classes: list[str]
    labels: NDArray[np.int64] | None
    priors: list[float] | None
    outcome: Outcome


@dataclass(frozen=True)
class _Measured:
    """What the test split says; `None` where there is none."""

    bits_per_dim: float | None = None
    accuracy: float | None = None
    images: int = 0


def class_shares(labels: NDArray[np.int64], classes: int) -> list[float]:
    """p(y) as counted; a class without an image is rare, not impossible."""
    counts = np.maximum(np.bincount(labels, minlength=classes), 0.5)
    return [float(count) for count in counts / counts.sum()]


def graphs(model: Model) -> dict[str, bytes]:
    """Export every graph of a model's bundle, by file name.

    Raises:
        ExportError: a graph cannot be expressed.
    """
    files = {"model.onnx": to_onnx(model)}
    if isinstance(model, Density) and model.draws:
        files |= {"sampler.onnx": to_sampler(model), **to_steps(model)}
    return files


def sample_count(spec: ImageSpec, files: Iterable[str]) -> int:
    """How many images the card's picture shows: sixteen, but four of many values all at once."""
    values = spec.height * spec.width * spec.channels
    return 16 if "step.onnx" in files else max(4, min(16, SAMPLED // values // 4 * 4))


def samples(manifest: bundles.Manifest, files: Mapping[str, bytes]) -> bytes | None:
    """Draw the card's picture, `sample_count` images at temperature 1.

    Returns:
        a PNG; None where it would take longer than `DRAWING_SECONDS`.
    """
    sampler, known = Sampler(manifest, files, manifest.name, device="cpu"), 0
    began = time.monotonic()
    with counting("drawing samples", sampler.steps) as advance:

        def tell(done: int, steps: int) -> None:
            nonlocal known
            if time.monotonic() - began > DRAWING_SECONDS:
                raise _TooSlowError
            advance(done - known)
            known = done

        try:
            drawn = sampler.draw(sample_count(manifest.image, files), progress=tell)
        except _TooSlowError:
            say(f"no picture of samples: drawing takes longer than {DRAWING_SECONDS:g} seconds")
            return None
    png = io.BytesIO()
    grid(drawn.images, side=64).save(png, "PNG", optimize=True)
    return png.getvalue()


class _TooSlowError(Exception):
    """Drawing has taken its time."""


def write(
    trained: Trained,
    *,
    data: str,
    group: str | None,
    licence: str | None,
    out: Path,
    folder: Path,
    exclude: str | None = None,
    priors: Mapping[str, float] | None = None,
    init: str | None = None,
    history: str | None = None,
) -> None:
    """Write the bundle `out`, and the report on its strangest images into `folder`.

    Args:
        trained: the model and its history.
        data: the DATA argument, whose test split is scored where there is one.
        group: the --group argument.
        licence: of the weights; None where nobody said.
        out: the bundle's folder.
        folder: the run's folder.
        exclude: the --exclude argument, and
        priors: what --prior said, for the card.
        init: the bundle that the weights started from.
        history: of weights that were not trained here, the card's section on it.

    Raises:
        ExportError: onnxruntime does not give torch's numbers.
        BundleError: the bundle cannot be written.
    """
    images, splits, model = trained.images, trained.splits, trained.model
    if init and not trained.outcome.budget:  # its weights are those of `init`, and so is the rest
        history = card.history_of(_card(init))
        licence = licence or bundles.read_bundle(init).manifest.licence
    files = graphs(model)
    some = splits.validation[:PARITY_IMAGES]
    parity = check_parity(model, files["model.onnx"], crops(images.pixels, some, [0]))
    session = Session(files["model.onnx"], device="cpu")
    score_name = _score_name(trained, encodes="embedding" in session.outputs)
    temperature = _temperature(session, trained) if score_name == BY_CLASS else None
    test = _test_split(session, trained, data, temperature or 1.0)
    manifest = _manifest(trained, out.name, session, test, licence, score_name, temperature)
    if "sampler.onnx" in files and (picture := samples(manifest, files)) is not None:
        files["samples.png"] = picture
    about = card.Training(
        model=trained.recipe.model,
        data=data,
        group=group,
        exclude=exclude,
        priors=dict(priors or {}),
        labels=bool(trained.classes),
        out=str(out),
        counts={name: len(getattr(splits, name)) for name in SPLITS},
        minutes=trained.outcome.seconds / 60,
        machine=trained.outcome.machine,
        images_per_second=trained.outcome.images / max(trained.outcome.seconds, 1e-9),
        validation=trained.outcome.validation,
        unit=model.unit,
        parity=parity,
        test=test.images,
        accuracy=test.accuracy,
        init=init,
        minutes_before=card.minutes_of(_card(init)) if init else 0.0,
        history=history,
        drawn=sample_count(trained.spec, files) if "samples.png" in files else 0,
        companions="main" in trained.recipe.train.frozen,
    )
    if model.kind == "density":
        calibration, text, manifest, texture = _calibrated(
            trained, session, manifest, about, folder
        )
        _warn_of_guesses(trained, float(np.median(calibration.fit_nll)))
        if texture is not None:
            files["texture.npz"] = texture.pack()
    else:
        calibration = bundles.Calibration.hashes_alone(*_hashes(images, splits))
        text = card.write_plain_card(manifest, about)
    bundles.write_bundle(
        out,
        manifest,
        files
        | {
            "calibration.npz": bundles.pack_calibration(calibration),
            "golden.npz": bundles.pack_golden(_golden(session, trained.spec, model.kind)),
            "CARD.md": text.encode(),
            "recipe.toml": trained.recipe.to_toml().encode(),
            "weights.safetensors": pack_weights(model),
        },
    )
    forget(folder)
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    (folder / "job.json").unlink(missing_ok=True)
    if test.bits_per_dim is not None:
        by_bayes = f", accuracy {test.accuracy:.4f}" if test.accuracy is not None else ""
        say(f"{out}: {test.bits_per_dim:.4f} bits/dim{by_bayes} on the test split")
    elif test.accuracy is not None:
        say(f"{out}: accuracy {test.accuracy:.4f} on the test split")
    else:
        say(f"{out}: {trained.outcome.validation:.4f} {model.unit} on the validation split")


def _warn_of_guesses(trained: Trained, nll: float) -> None:
    """Say of a density that gives held-out images no more than a uniform guess does."""
    spec = trained.spec
    bits = nll / (spec.height * spec.width * spec.channels * math.log(2))
    guess = math.log2(spec.levels)
    if bits >= guess:
        say(
            f"warning: {bits:.2f} bits/dim on held-out images, and a uniform guess has {guess:g}: "
            "this density has learned nothing yet; train longer, with --epochs or --minutes"
        )


def _card(bundle: str) -> str:
    return bundles.read_bundle(bundle).read("CARD.md").decode()


def _calibrated(
    trained: Trained,
    session: Session,
    manifest: bundles.Manifest,
    about: card.Training,
    folder: Path,
) -> tuple[bundles.Calibration, str, bundles.Manifest, Texture | None]:
    """Score the held-out splits with the exported graph; return tables, card and manifest."""
    images, splits = trained.images, trained.splits
    texture = _texture(session, trained) if trained.spec.tiled else None
    fit = _scored(session, trained, splits.fit, "fit split", texture)
    held_out = _scored(session, trained, splits.calibration, "calibration split", texture)
    fit_nll = negative_log_likelihood(fit.log_likelihood, manifest.priors)
    nll = negative_log_likelihood(held_out.log_likelihood, manifest.priors)
    n = fewest = len(nll)
    fit_labels = None
    if trained.labels is not None:
        fit_labels = trained.labels[splits.fit]
    if held_out.texture is not None:
        scores = held_out.texture
    else:
        score = make_score(
            manifest.score_name, Fit(fit_nll, fit.statistics, fit.embedding, fit_labels)
        )
        scores = score(nll, held_out.statistics, held_out.embedding)
    if trained.labels is None:
        found = ranks(scores, None)
    else:
        found = ranks_by_class(
            scores,
            held_out.log_likelihood,
            trained.labels[splits.calibration],
            classes=trained.classes,
            priors=manifest.priors,
            temperature=cast("float", manifest.temperature),
            doubt=manifest.doubt,
        )
        fewest = int(found["class_counts"].min())
    training, calibrating = _hashes(images, splits)
    calibration = bundles.Calibration(
        **bundles.Calibration.by_nll(
            fit_nll,
            fit.statistics,
            fit.embedding if manifest.score_name in (BY_CODE, BY_CLASS) else None,
            fit_labels,
        ),
        **found,
        training_hashes=training,
        calibration_hashes=calibrating,
        tiles=None if held_out.tiles is None else np.sort(held_out.tiles),
    )
    alpha = conformal.default_alpha(fewest)
    manifest = replace(manifest, calibration_n=n, default_alpha=alpha)
    strangest, sheet = _strangest(
        images, splits.calibration, scores, nll / (trained.model.shape.dims * math.log(2))
    )
    text = card.write_card(
        manifest, about, np.sort(scores), calibration.threshold(alpha), strangest
    )
    listed, picture = report.write_strangest(folder, strangest, sheet)
    say(f"alpha {alpha:g} from {n:,} calibration images")
    if alpha > conformal.DEFAULT_ALPHA:
        say(
            f"{fewest} calibration images allow no smaller alpha than {alpha:g}; for "
            f"{conformal.DEFAULT_ALPHA} calibrate with {conformal.images_needed(0.01)}"
        )
    say(f"look at the {len(strangest)} strangest held-out normals: {picture}, {listed}")
    return calibration, text, manifest, texture


def _temperature(session: Session, trained: Trained) -> float:
    labels = cast("NDArray[np.int64]", trained.labels)
    rows = trained.splits.validation
    raw = _scored(session, trained, rows, "validation split")
    return fit_temperature(raw.log_likelihood, labels[rows], trained.priors)


def _hashes(images: TrainingData, splits: Splits) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return what training has seen, and what calibration holds out."""
    calibrating = splits.calibration
    training = np.unique(np.delete(images.hashes, calibrating))
    return training, np.unique(images.hashes[calibrating])


def _texture(session: Session, trained: Trained) -> Texture:
    """Fit the texture to photographs drawn until they have `FIT_PIXELS`, none of calibration.

    Those that trained the weights are among them: surfaces vary more than a small fit split
    shows, and a Gaussian remembers none of them.
    """
    splits = trained.splits
    seen = np.concatenate([splits.train, splits.fit])
    rows = np.random.default_rng(trained.recipe.train.seed).permutation(seen)
    fields: list[Field] = []
    pixels = 0
    with counting("reading texture", len(rows)) as advance:
        for row in rows:
            if pixels < FIT_PIXELS:
                fields.append(tiling.field(session, trained.spec, trained.images.pixels[row]))
                pixels += fields[-1].grey.size
            advance(1)
    return Texture.fit(fields)


def _scored(
    session: Session,
    trained: Trained,
    rows: NDArray[np.int64],
    what: str,
    texture: Texture | None = None,
) -> Raw:
    """Score rows of the decoded images with the exported graph, reading a slab at a time."""
    pixels, spec = trained.images.pixels, trained.spec
    slab, parts = 1 if spec.tiled else 8 * session.batch, []
    with counting(f"scoring {what}", len(rows)) as advance:
        for start in range(0, len(rows), slab):
            some = rows[start : start + slab]
            images = pixels[some] if isinstance(pixels, np.ndarray) else [pixels[some[0]]]
            parts.append(tiling.run(session, spec, images, texture=texture, progress=advance))
    return Raw.concat(parts)


def _test_split(session: Session, trained: Trained, data: str, temperature: float) -> _Measured:
    """Measure bits/dim, and the accuracy of what tells classes apart, on DATA's test split."""
    if trained.model.kind == "autoencoder":
        return _Measured()
    root, labels = data.removesuffix(":train"), bool(trained.classes)
    try:
        source = (
            open_evaluation(root, labels=labels).normal
            if has_kinds(root)
            else open_source(root, split="test", labels=labels)
        )
        training_data = open_source(data, split="train")
    except SourceError:
        return _Measured()
    if source.name == training_data.name and len(source) == len(training_data):
        return _Measured()  # a folder with one split is that split, whichever is asked for
    with counting("scoring test split", len(source)) as advance:
        scored = collect(session, trained.spec, source, progress=advance)
    if scored is None:
        return _Measured()
    raw, accuracy = scored.raw, None
    if trained.classes:
        places = np.argmax(
            log_posterior(raw.log_likelihood, trained.priors, temperature)
            if raw.log_posterior is None
            else raw.log_posterior,
            axis=1,
        ).tolist()
        right = [
            trained.classes[place] == label
            for place, label in zip(places, scored.labels, strict=True)
        ]
        accuracy = float(np.mean(right))
    if trained.model.kind == "classifier":
        return _Measured(accuracy=accuracy, images=len(scored))
    nll = negative_log_likelihood(raw.log_likelihood, trained.priors)
    bits = nll.mean() / (trained.model.shape.dims * math.log(2))
    return _Measured(float(bits), accuracy, len(scored))


def _manifest(
    trained: Trained,
    name: str,
    session: Session,
    test: _Measured,
    licence: str | None,
    score_name: str,
    temperature: float | None,
) -> bundles.Manifest:
    model = trained.model
    units = UNITS | {"statistics": ", ".join(model.units)}
    return bundles.Manifest(
        format_version=bundles.FORMAT_VERSION,
        name=name,
        version="1",
        kind=model.kind,  # type: ignore[arg-type]
        created=datetime.now(UTC).replace(microsecond=0).isoformat(),
        image=trained.spec,
        likelihood=model.likelihood if isinstance(model, Density) else "none",
        score_name=score_name,
        guarantee={"kind": "marginal", "confidence": None},
        classes=trained.classes or None,
        priors=trained.priors,
        outputs={output: {"unit": units[output]} for output in session.outputs},
        statistics=list(model.statistics),
        default_alpha=conformal.DEFAULT_ALPHA,
        opset=OPSET,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bits_per_dim={"test": test.bits_per_dim},
        tolerance={CPU: TOLERANCE, CUDA: 10 * TOLERANCE},
        calibration_n=0,
        files={},
        data_digest=trained.images.digest,
        licence=licence or "unspecified",
        temperature=temperature,
        doubt=0.0 if temperature is None else DOUBT,
    )


def _score_name(trained: Trained, *, encodes: bool) -> str:
    if trained.model.kind != "density":
        return "none"
    if trained.spec.tiled:
        return "texture"
    if trained.classes:
        return BY_CLASS
    return BY_CODE if encodes and trained.recipe.train.codes else SCORE


def _golden(session: Session, spec: ImageSpec, kind: str) -> bundles.Golden:
    """Score four made-up images: black, white, a ramp and noise. No training image travels."""
    shape = (spec.height, spec.width, spec.channels)
    ramp = np.linspace(0, 255, spec.height * spec.width * spec.channels).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = np.stack(
        [np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), ramp.reshape(shape), noise]
    )
    raw = session.run(images)
    return bundles.Golden(
        images,
        raw.log_likelihood,
        raw.statistics,
        raw.log_posterior,
        raw.embedding if kind == "autoencoder" else None,
    )


def _strangest(
    images: TrainingData,
    rows: NDArray[np.int64],
    scores: NDArray[np.float64],
    bits_per_dim: NDArray[np.float64],
) -> tuple[list[report.Strange], list[NDArray[np.uint8]]]:
    """Return the strangest calibration images, each with its p-value among the others."""
    order = np.argsort(-scores, kind="stable")[:STRANGEST]
    at_least = [int((scores >= scores[place]).sum()) for place in order]
    found = [
        report.Strange(
            name=images.names[rows[place]],
            p_value=count / len(scores),
            bits_per_dim=float(bits_per_dim[place]),
        )
        for place, count in zip(order, at_least, strict=True)
    ]
    return found, [images.pixels[rows[place]] for place in order]
