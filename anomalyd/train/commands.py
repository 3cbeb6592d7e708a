"""`anomalyd train` and `anomalyd export`: from images to a bundle, from weights to a bundle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anomalyd.config import from_table
from anomalyd.detect import bundle as bundles
from anomalyd.detect.bayes import check_priors
from anomalyd.detect.conformal import DEFAULT_ALPHA, images_needed
from anomalyd.detect.golden import check_golden
from anomalyd.detect.runtime import Session
from anomalyd.errors import (
    BundleError,
    ExportError,
    ImageError,
    SourceError,
    TrainingError,
    UsageError,
)
from anomalyd.images import ImageSpec, decode
from anomalyd.sources import open_source
from anomalyd.train import loop
from anomalyd.train.bundling import SPLITS, Trained, class_shares, graphs, samples, write
from anomalyd.train.data import TrainingData, claim, classes_of, excluded, gather, reopen
from anomalyd.train.export import check_parity, outputs_of
from anomalyd.train.models import TOO_LARGE, assemble, out_of_memory
from anomalyd.train.progress import counting, say, training
from anomalyd.train.recipe import (
    Recipe,
    default_recipe,
    parse_recipe,
    read_recipe,
    recipe_of,
)
from anomalyd.train.settings import TrainSettings
from anomalyd.train.splits import near_duplicates, split
from anomalyd.train.weights import load_weights, start_from, unpack_weights
from anomalyd.train.workers import Workers, join

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from anomalyd.density.base import Model
    from anomalyd.sources import Source

__all__ = ["export", "train"]

EASY_SIDE = 64
SHOWN = 5  # images left out that are named, of many
"""Without --image-size larger images are refused: they would train for days by accident."""

GREY_IMAGES = 16
"""The images that must be grey for a model to be: the first may be by chance."""


def train(
    *,
    data: str,
    model: str | None,
    out: Path,
    labels: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    device: str | None = None,
    group: str | None = None,
    exclude: Path | None = None,
    init: Path | None = None,
    resume: bool = False,
    recipe: Path | None = None,
    seed: int | None = None,
    on_mismatch: str | None = None,
    shrink: int | None = None,
    priors: Mapping[str, float] | None = None,
    licence: str | None = None,
) -> int:
    """Train a model on normal images and write a bundle, calibrated where it is a density.

    Arguments as in `anomalyd train --help`.

    Returns:
        0, or 3 if some images could not be used.

    Raises:
        AnomalydError: with one line on what is wrong.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
    """
    if minutes is not None and epochs is not None:
        raise UsageError("--minutes and --epochs contradict each other; give one of them")
    if minutes is not None and not 0 < minutes < math.inf:
        raise UsageError(f"--minutes must be a positive number, not {minutes:g}")
    asked: dict[str, Any] = {
        "model": model,
        "labels": labels,
        "image_size": image_size,
        "channels": channels,
        "minutes": minutes,
        "epochs": epochs,
        "group": group,
        "exclude": exclude and _file("--exclude", exclude),
        "init": init and str(init),
        "recipe": recipe and _file("--recipe", recipe),
        "seed": seed,
        "on_mismatch": on_mismatch,
        "shrink": shrink,
        "prior": dict(priors or {}),
        "licence": licence,
    }
    # A zero was asked for, a flag that is not set was not.
    asked = {k: v for k, v in asked.items() if v is not None and v is not False and v != {}}
    workers = join()
    folder = out.with_name(f"{out.name}.run")
    if not workers.first:
        workers.prepared()
        return _run(_Job.read(folder), out, folder, workers, device=device or "auto")
    if out.exists():
        raise UsageError(f"--out {out} exists; choose another name or remove it first")
    if resume or (workers.restarted and (folder / "job.json").exists()):
        job = _Job.read(folder)
        job.check(data, asked)
        workers.prepared()
        return _run(job, out, folder, workers, device=device or "auto")
    if priors:
        if not labels:
            raise UsageError("--prior: only classes have priors; add --labels")
        check_priors(priors, list(priors))  # their names wait for the images
    chosen = _chosen(model, recipe, init, epochs=epochs, seed=seed)
    if chosen.classifier is not None:
        raise UsageError(
            f"{recipe or init}: a recipe with [classifier] is of two bundles, joined and not "
            "trained; join them with `anomalyd compose CLASSIFIER DENSITY`"
        )
    if labels and not chosen.train.codes:
        raise UsageError(
            f"{recipe or init}: codes = false is for bundles without classes; with --labels the "
            "score reads the codes wherever there are any"
        )
    if init is not None:
        recipe_of(init)  # that it is a bundle is told before images are read
    size = {
        "height": image_size,
        "width": image_size,
        "channels": channels,
        "on_mismatch": on_mismatch,
        "shrink": shrink,
    }
    source = open_source(data, split="train", labels=labels, group=group)
    spec = _image_spec(source, chosen.image | {k: v for k, v in size.items() if v is not None})
    chosen = dataclasses.replace(chosen, image=dataclasses.asdict(spec))
    # A wrong option is told before images are read; two classes stand for those to be found.
    like = assemble(chosen, spec, 2 if labels else 0)
    _check_tiles(like, spec)
    if priors and like.kind == "classifier":
        raise UsageError(
            "--prior: a classifier learns p(y) from its images and heeds no other; leave it out, "
            "and give it to `anomalyd score` once a density is joined to it"
        )
    start = str(init) if init else None
    left_out = str(exclude) if exclude else None
    job = _Job(
        data,
        chosen.to_toml(),
        labels,
        minutes,
        start,
        licence,
        group,
        left_out,
        dict(priors or {}),
        asked,
    )
    claim(folder)
    with counting("decoding", len(source)) as advance:
        gather(source, spec, folder, exclude=excluded(exclude), advance=advance)
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    job.write(folder)
    workers.prepared()
    try:
        return _run(job, out, folder, workers, device=device or "auto")
    except Exception:
        # Before the first checkpoint there is nothing to go on with, and the command, corrected,
        # starts anew. torchrun starts the same again.
        if not (workers.launched or (folder / "checkpoint.safetensors").exists()):
            (folder / "job.json").unlink(missing_ok=True)
        raise


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a run was asked to do, kept in its folder so that --resume needs no flag repeated."""

    data: str
    recipe: str
    labels: bool = False
    minutes: float | None = None
    init: str | None = None
    licence: str | None = None
    group: str | None = None
    exclude: str | None = None
    priors: dict[str, float] = dataclasses.field(default_factory=dict)
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The options as given; those of a run that an earlier version began are not known."""

    def write(self, folder: Path) -> None:
        # Written last: a run folder without it holds no complete set of images.
        partial = folder / "job.part"
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2), encoding="utf-8")
        partial.replace(folder / "job.json")

    @classmethod
    def read(cls, folder: Path) -> _Job:
        try:
            return cls(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"--resume: {folder} holds no interrupted run; train without --resume"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"--resume: {folder / 'job.json'} is damaged ({error}); remove {folder} and train "
                "again"
            ) from error

    def check(self, data: str, asked: dict[str, Any]) -> None:
        """Refuse what a resumed run would not heed: other images, other options."""
        if data != self.data:
            raise UsageError(
                f"--resume: the interrupted run trains on {self.data}, not {data}; give that, or "
                "another --out"
            )
        for name, value in asked.items():
            before = self.asked.get(name)
            if self.asked and value != before:
                began = "without" if before is None else f"with {before}"
                raise UsageError(
                    f"--resume: --{name.replace('_', '-')} {value} comes too late, the run was "
                    f"started {began}; leave it out, or train anew with another --out"
                )


def _file(option: str, path: Path) -> str:
    """Return the name of a file and what tells its content from another."""
    try:
        return f"{path} (SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read: {error.strerror}") from error


def _chosen(
    model: str | None,
    path: Path | None,
    init: Path | None,
    *,
    epochs: float | None,
    seed: int | None,
) -> Recipe:
    """Find the recipe: a file, else that of the bundle to start from, else the model's own."""
    if path is not None:
        recipe = read_recipe(path)
    elif init is not None and model in (None, (theirs := recipe_of(init)).model):
        recipe = theirs
    elif model is not None:
        recipe = default_recipe(model)
    else:
        raise UsageError("say what to train: --model NAME, --recipe FILE or --init BUNDLE")
    if model not in (None, recipe.model):
        raise UsageError(f"--model {model} contradicts the recipe, which is for {recipe.model}")
    given: dict[str, Any] = {"epochs": epochs, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    from_table(TrainSettings, given, "command line")  # refuses what a recipe could not say
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **given))


def _image_spec(source: Source, asked: dict[str, object]) -> ImageSpec:
    """Complete what was asked for with the size of the first readable image, and with channels.

    Grey is what the first `GREY_IMAGES` readable images are, all of them.
    """
    if not {"height", "width", "channels"} <= asked.keys():
        readable = _readable(source)
        first = next(readable)
        height, width, channels = first.shape
        if "channels" not in asked:
            grey = _is_grey(first) and all(map(_is_grey, islice(readable, GREY_IMAGES - 1)))
            channels = 1 if grey else 3
        if "height" not in asked and max(height, width) > EASY_SIDE:
            raise UsageError(
                f"{source.name}: its images are {height}x{width}; give --image-size (a side of 32 "
                f"or {EASY_SIDE} is usual) or height and width in a recipe"
            )
        asked = {"height": height, "width": width, "channels": channels} | asked
    return ImageSpec(**asked)  # type: ignore[arg-type]


def _check_tiles(model: Model, spec: ImageSpec) -> None:
    """Refuse a density that cannot score photographs, before it is trained."""
    shape = (1, spec.height, spec.width, spec.channels)
    if spec.tiled and model.kind == "density":
        if model.classes:
            raise UsageError(
                "--on-mismatch tile: photographs are scored by their texture, which knows no "
                "classes; leave --labels out, or train a density of each with --per-folder"
            )
        with torch.no_grad():
            outputs = outputs_of(model(torch.zeros(shape, dtype=torch.uint8)))
        if "excess_map" not in outputs:
            raise UsageError(
                "--on-mismatch tile: photographs are scored by what a density expects of every "
                "pixel, which this one does not say; take a PixelCNN or PixelRNN"
            )


def _readable(source: Source) -> Iterator[NDArray[np.uint8]]:
    """Yield the images that can be read, (H, W, C) at their own sizes; there must be one."""
    first, found = "", False
    for item in source:
        try:
            if item.error is not None:
                raise item.error
            if isinstance(item.payload, np.ndarray):
                pixels = item.payload.reshape(*item.payload.shape[:2], -1)
            else:
                payload = item.payload
                data = payload.read_bytes() if isinstance(payload, Path) else payload
                pixels = decode(data, 3)
        except (ImageError, OSError) as error:
            first = first or f"{item.source}: {error}"
            continue
        found = True
        yield pixels
    if not found:
        raise SourceError(f"{source.name}: no image can be read{'; ' if first else ''}{first}")


def _is_grey(pixels: NDArray[np.uint8]) -> bool:
    return bool((pixels == pixels[..., :1]).all())


def _run(job: _Job, out: Path, folder: Path, workers: Workers, *, device: str) -> int:
    """Train, export, calibrate, describe, write: everything after the images are decoded."""
    recipe = parse_recipe(job.recipe, f"recipe of {out.name}")
    spec = ImageSpec(**recipe.image)
    images = reopen(folder)
    try:
        splits = split(images.hashes, images.groups, seed=recipe.train.seed)
    except TrainingError as error:
        if images.unreadable:
            _say_unused(images)
        raise error from None
    sizes = ", ".join(f"{name} {len(getattr(splits, name)):,}" for name in SPLITS)
    same = "; validation and fit are the same" if splits.fit is splits.validation else ""
    say(f"{len(images.names):,} images: {sizes}{same}")
    near = near_duplicates(images.pixels, splits)
    if near:
        say(
            f"{near:,} thumbnails of held-out images also occur in training; if photographs of "
            "one object are spread over the splits, --group keeps them together"
        )
    torch.set_num_threads(workers.threads)
    torch.manual_seed(recipe.train.seed)
    classes, labels = classes_of(images) if job.labels else ([], None)
    priors = None
    if labels is not None:
        priors = class_shares(labels[splits.train], len(classes))
        if job.priors:
            priors = list(check_priors(job.priors, classes))
    model = assemble(recipe, spec, len(classes), priors)
    if labels is not None and model.kind == "density":
        _check_classes(labels[splits.calibration], classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{recipe.model}: {parameters:,} parameters, "
        f"{spec.height}x{spec.width}x{spec.channels} images"
        + (f", {len(classes)} classes" if classes else "")
    )
    # A run that was stopped before its first checkpoint starts again, from the same seed.
    resume = (folder / "checkpoint.safetensors").exists()
    if job.init and not resume:
        _start_from(model, recipe, Path(job.init))
    try:
        with training(model.loss_name) as progress:
            outcome = loop.fit(
                model,
                images.pixels,
                splits,
                recipe.train,
                folder,
                labels=labels,
                device=workers.device(loop.pick_device(device)),
                minutes=job.minutes,
                resume=resume,
                progress=progress,
                workers=workers,
            )
    except KeyboardInterrupt:
        same = f"{shlex.quote(job.data)} --out {shlex.quote(str(out))}"
        say(f"stopped at a checkpoint; go on with: anomalyd train {same} --resume")
        raise
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"{recipe.model}: {TOO_LARGE}") from error
    workers.leave()
    epochs = round(outcome.budget / outcome.steps_per_epoch, 6)
    if job.init and not outcome.budget:  # made anew: its weights were trained as they were
        epochs = recipe_of(Path(job.init)).train.epochs
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, epochs=epochs))
    trained = Trained(model, recipe, spec, images, splits, classes, labels, priors, outcome)
    write(
        trained,
        data=job.data,
        group=job.group,
        exclude=job.exclude,
        priors=job.priors,
        licence=job.licence,
        out=out,
        folder=folder,
        init=job.init,
    )
    _say_unused(images)
    # torchrun takes any code but 0 for a death, and would start over.
    return 3 if images.unreadable and not workers.launched else 0


def _say_unused(images: TrainingData) -> None:
    """Name what was left out, the first few of many: the rest is left out likewise."""
    unused = images.unreadable
    for unreadable in unused[:SHOWN]:
        say(f"not used: {unreadable}")
    if len(unused) > SHOWN:
        total = len(unused) + len(images.names)
        say(f"not used: {len(unused) - SHOWN:,} more, {len(unused):,} of {total:,} images in all")


def _check_classes(labels: NDArray[np.int64], classes: list[str]) -> None:
    """Refuse classes that could not be calibrated, before they are trained."""
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    without = [name for name, count in zip(classes, counts, strict=True) if not count]
    if without:
        raise TrainingError(
            f"--labels: the calibration split has no image of {', '.join(without[:5])}"
            f"{', ...' if len(without) > 5 else ''}, and each of the {len(classes)} classes needs "
            f"one, {images_needed(DEFAULT_ALPHA)} for an alpha of {DEFAULT_ALPHA:g}; add images "
            "of them, or leave them out with --exclude"
        )


def _start_from(model: Model, recipe: Recipe, init: Path) -> None:
    """Take the weights of a bundle: all of them, or of another model those that fit."""
    weights = bundles.read_bundle(init).read("weights.safetensors")
    theirs = recipe_of(init).model
    prefix = "labeller." if theirs == "classifier" else ""
    taken = start_from(model, unpack_weights(weights, str(init)), prefix)
    if len(taken) < len(model.state_dict()):
        say(f"{len(taken)} tensors of {init} ({theirs}) are the start of this {recipe.model}")


def export(bundle: Path) -> int:
    """Export a bundle's weights again; calibration stays, so scores must not change.

    Raises:
        ExportError: the new graph does not reproduce the bundle's golden scores.
    """
    old = bundles.read_bundle(bundle)
    recipe, manifest = recipe_of(bundle), old.manifest
    model = assemble(recipe, manifest.image, len(manifest.classes or ()))
    load_weights(model, old.read("weights.safetensors"), str(bundle))
    files = graphs(model)
    parity = check_parity(model, files["model.onnx"], old.golden.images)
    try:
        check_golden(Session(files["model.onnx"], device="cpu"), manifest, old.golden)
    except BundleError as error:
        raise ExportError(
            f"{bundle}: {error}; nothing was written; train or calibrate anew"
        ) from error
    if "sampler.onnx" in files and (picture := samples(manifest, files)) is not None:
        files["samples.png"] = picture
    kept = {name: old.read(name) for name in manifest.files}
    bundles.write_bundle(bundle, manifest, kept | files, replace=True)
    say(f"{bundle}: exported again; torch against onnxruntime {parity:.1e} {model.unit}")
    return 0
