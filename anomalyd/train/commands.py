"""`anomalyd train` and `anomalyd export`: from images to a bundle, from weights to a bundle."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from anomalyd.detect import bundle as bundles
from anomalyd.detect import conformal
from anomalyd.detect.pipeline import collect
from anomalyd.detect.runtime import CPU, CUDA, Raw, Session, available_cpus
from anomalyd.detect.statistics import typicality
from anomalyd.errors import ExportError, ImageError, SourceError, UsageError
from anomalyd.images import ImageSpec, decode
from anomalyd.sources import open_source
from anomalyd.train import card, loop, report
from anomalyd.train.data import TrainingData, excluded, gather, reopen
from anomalyd.train.export import OPSET, TOLERANCE, check_parity, to_onnx
from anomalyd.train.models import build
from anomalyd.train.progress import counting, say, training
from anomalyd.train.recipe import Recipe, default_recipe, parse_recipe, read_recipe
from anomalyd.train.splits import Splits, near_duplicates, split
from anomalyd.train.weights import load_weights, pack_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.density.base import Density
    from anomalyd.sources import Source

__all__ = ["export", "train"]

SPLITS = ("train", "validation", "fit", "calibration")
PARITY_IMAGES = 64
STRANGEST = 20
EASY_SIDE = 64
"""Without --image-size larger images are refused: they would train for days by accident."""


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
    licence: str | None = None,
) -> int:
    """Train a density on normal images and write a calibrated bundle.

    Arguments as in `anomalyd train --help`.

    Returns:
        0, or 3 if some images could not be used.

    Raises:
        AnomalydError: with one line on what is wrong.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
    """
    if labels:
        raise UsageError("--labels: no density here is class-conditional; train without it")
    if minutes is not None and epochs is not None:
        raise UsageError("--minutes and --epochs contradict each other; give one of them")
    if out.exists():
        raise UsageError(f"--out {out} exists; choose another name or remove it first")
    folder = out.with_name(f"{out.name}.run")
    if resume:
        return _run(_Job.read(folder), out, folder, device=device or "auto", resume=True)
    chosen = _chosen(model, recipe, init, epochs=epochs, seed=seed)
    asked = {
        "height": image_size,
        "width": image_size,
        "channels": channels,
        "on_mismatch": on_mismatch,
    }
    source = open_source(data, split="train", group=group)
    spec = _image_spec(source, chosen.image | {k: v for k, v in asked.items() if v is not None})
    chosen = dataclasses.replace(chosen, image=dataclasses.asdict(spec))
    build(chosen.model, spec, chosen.density)  # a wrong option is told before images are read
    job = _Job(data, chosen.to_toml(), minutes, str(init) if init else None, licence)
    _claim(folder)
    with counting("decoding", len(source)) as advance:
        gather(source, spec, folder, exclude=excluded(exclude), advance=advance)
    job.write(folder)
    return _run(job, out, folder, device=device or "auto", resume=False)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a run was asked to do, kept in its folder so that --resume needs no flag repeated."""

    data: str
    recipe: str
    minutes: float | None = None
    init: str | None = None
    licence: str | None = None

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


def _claim(folder: Path) -> None:
    """Make the run folder, unless a run that could be resumed lives there."""
    if (folder / "job.json").exists():
        raise UsageError(
            f"{folder} holds an interrupted run; continue it with --resume, or remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}") from error


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
    elif init is not None:
        text = bundles.read_bundle(init).read("recipe.toml").decode()
        recipe = parse_recipe(text, f"{init}/recipe.toml")
    elif model is not None:
        recipe = default_recipe(model)
    else:
        raise UsageError("say what to train: --model NAME, --recipe FILE or --init BUNDLE")
    if model not in (None, recipe.model):
        raise UsageError(f"--model {model} contradicts the recipe, which is for {recipe.model}")
    settings = recipe.train
    if epochs is not None:
        settings = dataclasses.replace(settings, epochs=epochs)
    if seed is not None:
        settings = dataclasses.replace(settings, seed=seed)
    return dataclasses.replace(recipe, train=settings)


def _image_spec(source: Source, asked: dict[str, object]) -> ImageSpec:
    """Complete what was asked for with the size and the channels of the first readable image."""
    if not {"height", "width", "channels"} <= asked.keys():
        height, width, channels = _first_shape(source)
        if "height" not in asked and max(height, width) > EASY_SIDE:
            raise UsageError(
                f"{source.name}: its images are {height}x{width}; give --image-size (a side of 32 "
                f"or {EASY_SIDE} is usual) or height and width in a recipe"
            )
        asked = {"height": height, "width": width, "channels": channels} | asked
    return ImageSpec(**asked)  # type: ignore[arg-type]


def _first_shape(source: Source) -> tuple[int, int, int]:
    """Height, width and channels of the first image that can be read."""
    first = ""
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
        grey = pixels.shape[2] == 1 or bool((pixels == pixels[..., :1]).all())
        return (*pixels.shape[:2], 1 if grey else 3)
    raise SourceError(f"{source.name}: no image can be read{'; ' if first else ''}{first}")


def _run(job: _Job, out: Path, folder: Path, *, device: str, resume: bool) -> int:
    """Train, export, calibrate, describe, write: everything after the images are decoded."""
    recipe = parse_recipe(job.recipe, f"recipe of {out.name}")
    spec = ImageSpec(**recipe.image)
    images = reopen(folder)
    splits = split(images.hashes, images.groups, seed=recipe.train.seed)
    sizes = ", ".join(f"{name} {len(getattr(splits, name)):,}" for name in SPLITS)
    say(f"{len(images.names):,} images: {sizes}")
    near = near_duplicates(images.pixels, splits)
    if near:
        say(
            f"{near:,} thumbnails of held-out images also occur in training; if photographs of "
            "one object are spread over the splits, --group keeps them together"
        )
    torch.set_num_threads(available_cpus())
    torch.manual_seed(recipe.train.seed)
    density = build(recipe.model, spec, recipe.density)
    parameters = sum(parameter.numel() for parameter in density.parameters())
    say(
        f"{recipe.model}: {parameters:,} parameters, "
        f"{spec.height}x{spec.width}x{spec.channels} images"
    )
    if job.init and not resume:
        load_weights(density, bundles.read_bundle(job.init).read("weights.safetensors"), job.init)
    # A run that was stopped before its first checkpoint starts again, from the same seed.
    resume = resume and (folder / "checkpoint.safetensors").exists()
    try:
        with training() as progress:
            outcome = loop.fit(
                density,
                images.pixels,
                splits,
                recipe.train,
                folder,
                device=loop.pick_device(device),
                minutes=job.minutes,
                resume=resume,
                progress=progress,
            )
    except KeyboardInterrupt:
        say(f"stopped at a checkpoint; go on with: anomalyd train {job.data} --out {out} --resume")
        raise
    epochs = round(outcome.budget / outcome.steps_per_epoch, 3)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, epochs=epochs))
    _bundle(job, recipe, spec, images, splits, density, outcome, out, folder)
    for unreadable in images.unreadable:
        say(f"not used: {unreadable}")
    return 3 if images.unreadable else 0


def _bundle(
    job: _Job,
    recipe: Recipe,
    spec: ImageSpec,
    images: TrainingData,
    splits: Splits,
    density: Density,
    outcome: loop.Outcome,
    out: Path,
    folder: Path,
) -> None:
    """Export, calibrate on the exported graph, describe and write."""
    graph = to_onnx(density)
    parity = check_parity(density, graph, images.pixels[splits.validation[:PARITY_IMAGES]])
    session = Session(graph, device="cpu")
    fit = _scored(session, images.pixels, splits.fit, "fit split")
    held_out = _scored(session, images.pixels, splits.calibration, "calibration split")
    fit_nll = np.sort(-fit.log_likelihood[:, 0])
    scores = typicality(-held_out.log_likelihood[:, 0], fit_nll)
    n = len(scores)
    calibration = bundles.Calibration(
        fit_nll=fit_nll,
        fit_statistics=fit.statistics,
        scores=np.sort(scores),
        p_table=conformal.p_table(n),
        training_hashes=np.unique(np.delete(images.hashes, splits.calibration)),
        calibration_hashes=np.unique(images.hashes[splits.calibration]),
    )
    test_bits, test_count = _test_split(session, job.data, spec, density)
    manifest = _manifest(
        out.name,
        density,
        spec,
        calibration_n=n,
        test_bits=test_bits,
        digest=images.digest,
        licence=job.licence,
    )
    strangest, sheet = _strangest(images, splits.calibration, scores, held_out, density.shape.dims)
    about = card.Training(
        model=recipe.model,
        data=job.data,
        out=str(out),
        counts={split: len(getattr(splits, split)) for split in SPLITS},
        minutes=outcome.seconds / 60,
        machine=f"{available_cpus()} CPU cores ({platform.machine()})",
        images_per_second=outcome.images / max(outcome.seconds, 1e-9),
        validation=outcome.validation,
        parity=parity.bits_per_dim,
        test=test_count,
    )
    alpha = manifest.default_alpha
    # The verdict is p <= alpha: the threshold is the smallest score with such a p-value.
    rank = int(np.searchsorted(calibration.p_table, alpha, side="right"))
    threshold = float(calibration.scores[n - rank]) if rank else float(calibration.scores[-1])
    text = card.write_card(manifest, about, calibration.scores, threshold, strangest)
    bundles.write_bundle(
        out,
        manifest,
        {
            "model.onnx": graph,
            "calibration.npz": bundles.pack_calibration(calibration),
            "golden.npz": bundles.pack_golden(_golden(session, spec)),
            "CARD.md": text.encode(),
            "recipe.toml": recipe.to_toml().encode(),
            "weights.safetensors": pack_weights(density),
        },
    )
    table, picture = report.write_strangest(folder, strangest, sheet)
    (folder / "pixels.npy").unlink()  # the images themselves are the user's; this copy is ours
    (folder / "checkpoint.safetensors").unlink()
    (folder / "job.json").unlink()
    shown = "no test split" if test_bits is None else f"{test_bits:.4f} bits/dim on the test split"
    say(f"{out}: {shown}; alpha {alpha:g} from {n:,} calibration images")
    if alpha > conformal.DEFAULT_ALPHA:
        say(
            f"{n} calibration images allow no smaller alpha than {alpha:g}; for "
            f"{conformal.DEFAULT_ALPHA} calibrate with {conformal.images_needed(0.01)}"
        )
    say(f"look at the {len(strangest)} strangest held-out normals: {picture}, {table}")


def _scored(
    session: Session, pixels: NDArray[np.uint8], rows: NDArray[np.int64], what: str
) -> Raw:
    """Score rows of the decoded images with the exported graph, reading a slab at a time."""
    slab, parts = 8 * session.batch, []
    with counting(f"scoring {what}", len(rows)) as advance:
        for start in range(0, len(rows), slab):
            parts.append(session.run(pixels[rows[start : start + slab]], progress=advance))
    return Raw.concat(parts)


def _test_split(
    session: Session, data: str, spec: ImageSpec, density: Density
) -> tuple[float | None, int]:
    """Return the mean bits/dim and the size of DATA's test split, or None and 0 without one."""
    root = data.removesuffix(":train")
    try:
        source = open_source(root, split="test")
        training_data = open_source(data, split="train")
    except SourceError:
        return None, 0
    if source.name == training_data.name and len(source) == len(training_data):
        return None, 0  # a folder with one split is that split, whichever is asked for
    with counting("scoring test split", len(source)) as advance:
        scored = collect(session, spec, source, progress=advance)
    if scored is None:
        return None, 0
    bits = -scored.raw.log_likelihood[:, 0].mean() / (density.shape.dims * math.log(2))
    return float(bits), len(scored)


def _manifest(
    name: str,
    density: Density,
    spec: ImageSpec,
    *,
    calibration_n: int,
    test_bits: float | None,
    digest: str,
    licence: str | None,
) -> bundles.Manifest:
    return bundles.Manifest(
        format_version=bundles.FORMAT_VERSION,
        name=name,
        version="1",
        kind="density",
        created=datetime.now(UTC).replace(microsecond=0).isoformat(),
        image=spec,
        likelihood=density.likelihood,
        score_name="typicality",
        guarantee={"kind": "marginal", "confidence": None},
        classes=None,
        priors=None,
        outputs={
            "log_likelihood": {"unit": "nats"},
            "statistics": {"unit": ", ".join(density.units)},
            "nll_map": {"unit": "nats"},
        },
        statistics=list(density.statistics),
        default_alpha=conformal.default_alpha(calibration_n),
        opset=OPSET,
        parameters=sum(parameter.numel() for parameter in density.parameters()),
        bits_per_dim={"test": test_bits},
        tolerance={CPU: TOLERANCE, CUDA: 10 * TOLERANCE},
        calibration_n=calibration_n,
        files={},
        data_digest=digest,
        licence=licence or "unspecified",
    )


def _golden(session: Session, spec: ImageSpec) -> bundles.Golden:
    """Score four made-up images: black, white, a ramp and noise. No training image travels."""
    shape = (spec.height, spec.width, spec.channels)
    ramp = np.linspace(0, 255, spec.height * spec.width * spec.channels).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = np.stack(
        [np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), ramp.reshape(shape), noise]
    )
    raw = session.run(images)
    return bundles.Golden(images, raw.log_likelihood, raw.statistics)


def _strangest(
    images: TrainingData, rows: NDArray[np.int64], scores: NDArray[np.float64], raw: Raw, dims: int
) -> tuple[list[report.Strange], list[NDArray[np.uint8]]]:
    """Return the strangest calibration images, each with its p-value among the others."""
    order = np.argsort(-scores, kind="stable")[:STRANGEST]
    at_least = [int((scores >= scores[place]).sum()) for place in order]
    found = [
        report.Strange(
            name=images.names[rows[place]],
            p_value=count / len(scores),
            bits_per_dim=float(-raw.log_likelihood[place, 0]) / (dims * math.log(2)),
        )
        for place, count in zip(order, at_least, strict=True)
    ]
    return found, [images.pixels[rows[place]] for place in order]


def export(bundle: Path) -> int:
    """Export a bundle's weights again; calibration stays, so scores must not change.

    Raises:
        ExportError: the new graph does not reproduce the bundle's golden scores.
    """
    old = bundles.read_bundle(bundle)
    recipe = parse_recipe(old.read("recipe.toml").decode(), f"{bundle}/recipe.toml")
    spec = old.manifest.image
    density = build(recipe.model, spec, recipe.density)
    load_weights(density, old.read("weights.safetensors"), str(bundle))
    graph = to_onnx(density)
    parity = check_parity(density, graph, old.golden.images)
    session = Session(graph, device="cpu")
    moved = np.abs(session.run(old.golden.images).log_likelihood - old.golden.log_likelihood).max()
    bits = float(moved) / (density.shape.dims * math.log(2))
    if not bits <= TOLERANCE:
        raise ExportError(
            f"{bundle}: the exported graph differs from the golden scores by {bits:.1e} bits/dim, "
            f"more than {TOLERANCE:.0e}; nothing was written; train or calibrate anew"
        )
    kept = {name: old.read(name) for name in old.manifest.files}
    bundles.write_bundle(bundle, old.manifest, kept | {"model.onnx": graph}, replace=True)
    say(
        f"{bundle}: exported again; torch against onnxruntime {parity.bits_per_dim:.1e} bits/dim, "
        f"golden scores {bits:.1e}"
    )
    return 0
