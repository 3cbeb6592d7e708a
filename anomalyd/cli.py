"""The command line: options, messages and exit codes; the work is done elsewhere.

    0 done    1 failed    2 usage    3 done, but some inputs could not be read    130 interrupted

Data goes to stdout, messages and progress to stderr. Nothing heavy is imported before a command
runs: `anomalyd --help` loads neither numpy nor onnxruntime.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anomalyd.errors import (
    AnomalydError,
    BundleError,
    ImageError,
    MissingExtra,
    UsageError,
    printable,
)

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["main"]

FAILED, USAGE, UNREADABLE, INTERRUPTED = 1, 2, 3, 130

PATH = click.Path(path_type=Path)
SEED = click.IntRange(min=0)
device = click.option(
    "--device",
    type=click.Choice(("auto", "cpu", "cuda")),
    default="auto",
    show_default=True,
    help="Where the model runs.",
)
alpha = click.option(
    "--alpha",
    type=float,
    metavar="A",
    help="Rate of false alarms, in (0, 1)  [default: the bundle's]",
)
group = click.option(
    "--group",
    metavar="REGEX|COLUMN",
    help="Never split a group: a regular expression on the path, a column, or TABLE.csv:COLUMN.",
)
bundle = click.argument("bundle", type=PATH)
prior = click.option(
    "--prior",
    "priors",
    multiple=True,
    metavar="NAME=P",
    help="Probability of a class where the images come from; one for each class.",
)


def labelling(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of what gives labels."""
    for option in (
        prior,
        click.option(
            "--reject-cost",
            type=float,
            metavar="C",
            help="Give a label only where its expected cost, 1 if wrong, is at most C.",
        ),
        click.option(
            "--label-alpha",
            type=float,
            metavar="A",
            help="Share of images whose credible labels may lack the true one  [default: 0.1]",
        ),
    ):
        command = option(command)
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; every error is one line on stderr."""
    # numpy's products are small here, and while its threads wait for the next one they spin, on
    # cores that onnxruntime needs. Read when numpy is imported, which no command has done yet.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if sys.stdout is None:  # closed by whoever started us: nobody is there to print for
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        # Not anomalyd.main(): that has an exit code of its own for a closed pipe.
        given = sys.argv[1:] if arguments is None else list(arguments)
        with anomalyd.make_context("anomalyd", given) as context:
            code = anomalyd.invoke(context)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except AnomalydError as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "anomalyd"
        return _fail(f"{error.format_message().rstrip('.')} (see {command} --help)", USAGE)
    except click.ClickException as error:
        return _fail(error.format_message(), FAILED)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _drop_output()  # whoever read it has enough
        return 0
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        name = f"{error.filename}: " if error.filename else ""
        return _fail(f"{name}{error.strerror or error}", FAILED)
    except MemoryError as error:
        return _fail(f"out of memory: {error}".rstrip(": "), FAILED)


def _drop_output() -> None:
    """Send what is left of our output nowhere: the interpreter must not stumble over it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 99})
@click.version_option(package_name="anomalyd", message="%(prog)s %(version)s")
def anomalyd() -> None:
    """Anomaly detection on explicit image densities, with a false-alarm rate that can be promised.

    DATA and PATH name a folder of images, one image, an IDX file or a folder of IDX files, .npy,
    .npz or Parquet; DATA:train and DATA:test choose a split.
    """


@anomalyd.command()
@click.argument("data")
@click.option("--model", metavar="NAME", help="Density to train: the name of a recipe.")
@click.option("--out", type=PATH, required=True, metavar="DIR", help="Bundle to write.")
@click.option("--labels", is_flag=True, help="DATA has classes: sub-folders, labels or a column.")
@click.option("--image-size", type=int, metavar="N", help="Side of the model's images, pixels.")
@click.option("--channels", type=click.Choice(("1", "3")), help="Grey or RGB.")
@click.option("--minutes", type=float, metavar="M", help="Train for about this long.")
@click.option("--epochs", type=float, metavar="E", help="Train for this many passes over DATA.")
@device
@group
@click.option("--exclude", type=PATH, metavar="FILE", help="List of images to leave out.")
@click.option("--init", type=PATH, metavar="BUNDLE", help="Start from this bundle's weights.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted training.")
@click.option("--recipe", type=PATH, metavar="FILE", help="TOML recipe in place of --model.")
@click.option("--seed", type=SEED, metavar="S", help="Seed of weights, splits and data order.")
@click.option(
    "--on-mismatch",
    type=click.Choice(("refuse", "crop", "resize", "tile")),
    help="What to do with images of another shape; tile scores large photographs piece by piece "
    "[default: refuse]",
)
@click.option(
    "--shrink",
    type=int,
    metavar="K",
    help="With tile: scale photographs down by this whole factor first  [default: 1]",
)
@prior
@click.option("--licence", metavar="TEXT", help="Licence of the weights, for the bundle's card.")
@click.option(
    "--per-folder",
    is_flag=True,
    help="One density for each sub-folder of DATA, on Ray; --out is a folder of bundles.",
)
@click.option("--ray-address", metavar="ADDRESS", help="As for score; with --per-folder.")
def train(
    channels: str | None,
    priors: tuple[str, ...],
    per_folder: bool,
    ray_address: str | None,
    **options: Any,
) -> int:
    """Train a density on the normal images in DATA and write a calibrated bundle."""
    options["channels"] = int(channels) if channels else None
    options["priors"] = _priors(priors)
    if per_folder:
        return _train_per_folder(ray_address, **options)
    if ray_address is not None:
        raise UsageError("--ray-address is for --per-folder; add that")
    commands = _training()
    return int(commands.train(**options) or 0)


def _train_per_folder(address: str | None, data: str, out: Path, **options: Any) -> int:
    _training()
    from anomalyd.scale.cluster import cluster, require
    from anomalyd.scale.fleet import members, train_folders

    require()
    names = members(Path(data), out)
    failed = []
    if names:
        with cluster(address) as ray, _progress("training", len(names)) as advance:
            for done in train_folders(ray, Path(data), out, names, options):
                advance(1)
                _say(f"{done.name}: {done.error or 'trained'}")
                failed += [done.name] if done.error else []
    if failed and len(failed) == len(names):
        raise AnomalydError(f"none of {len(names)} models could be trained")
    _say(f"{out}: {len(names) - len(failed)} models trained" + (
        f", {len(failed)} failed: {_some(failed)}; the same command again tries those alone"
        if failed else ""
    ))  # fmt: skip
    return UNREADABLE if failed else 0


@anomalyd.command()
@click.argument("classifier", type=PATH)
@click.argument("density", type=PATH)
@click.option("--out", type=PATH, required=True, metavar="DIR", help="Bundle to write.")
@click.option(
    "--data",
    metavar="DATA",
    help="Labelled images that both were trained on  [default: what DENSITY's card names]",
)
@click.option("--licence", metavar="TEXT", help="Licence of the weights, for the bundle's card.")
def compose(
    classifier: Path, density: Path, out: Path, data: str | None, licence: str | None
) -> int:
    """Join CLASSIFIER and DENSITY into a bundle that labels, and rejects what fits no class."""
    _training()
    from anomalyd.train.compose import compose as run

    return run(classifier, density, out=out, data=data, licence=licence)


@anomalyd.command()
@bundle
def export(bundle: Path) -> int:
    """Export the graph of BUNDLE again, from its weights."""
    commands = _training()
    return int(commands.export(bundle) or 0)


@anomalyd.command()
@bundle
@click.argument("data")
@click.option(
    "--confidence",
    type=float,
    metavar="C",
    help="Promise the rate for this calibration set, with confidence C  [default: on average]",
)
@click.option(
    "--alpha",
    type=float,
    metavar="A",
    help="Decide at this rate of false alarms by default  [default: 0.01]",
)
@click.option("--refit", is_flag=True, help="Fit the score anew, too, on a separate half of DATA.")
@group
@device
def calibrate(
    bundle: Path,
    data: str,
    confidence: float | None,
    alpha: float | None,
    refit: bool,
    group: str | None,
    device: str,
) -> int:
    """Redo the promise of BUNDLE on the normal images in DATA, which training has not seen."""
    from anomalyd.detect.bundle import read_bundle
    from anomalyd.detect.calibrate import calibrate as run
    from anomalyd.detect.conformal import DEFAULT_ALPHA, round_up
    from anomalyd.detect.terminal import promise
    from anomalyd.sources import open_source

    if group is not None and not refit:
        raise UsageError("--group: only --refit splits DATA; leave it out or add --refit")
    by_class = read_bundle(bundle).manifest.temperature is not None
    source = open_source(data, split="train", group=group, labels=by_class)
    with _progress("calibrating", len(source)) as advance:
        done = run(
            bundle,
            source,
            confidence=confidence,
            alpha=alpha,
            refit=refit,
            device=device,
            progress=advance,
        )
    _name_unreadable(done.unreadable)
    if done.seen:
        _say(f"{len(done.seen)} images refused, training has seen them: {_some(done.seen)}")
    if done.repeated:
        _say(f"{done.repeated} images are copies of others; copies make the promise less sure")
    if done.fitted:
        _say(f"fitted on {done.fitted} images")
    _say(f"calibrated {bundle} on {done.n} images: {promise(done.confidence)}")
    default, smallest = round_up(done.default_alpha), round_up(done.smallest_alpha)
    _say(f"default alpha {default:g}, smallest {smallest:g}")
    if alpha is None and done.default_alpha > DEFAULT_ALPHA:
        each = " of each class" if by_class else ""
        _say(f"for an alpha of {DEFAULT_ALPHA} calibrate with {done.needed} images{each}")
    return UNREADABLE if done.unreadable else 0


@anomalyd.command()
@bundle
@click.option("--normal", required=True, metavar="DATA", help="Images that are normal.")
@click.option(
    "--outliers", multiple=True, metavar="NAME=DATA", help="Images that are not; repeatable."
)
@click.option("--labels", is_flag=True, help="Measure labels: the normal images have classes.")
@click.option(
    "--baseline", type=PATH, metavar="CLASSIFIER", help="With --labels: measure this one, too."
)
@labelling
@alpha
@click.option(
    "--fdr",
    type=float,
    metavar="Q",
    help="Share of false flags that simulated batches are held against  [default: 0.1]",
)
@click.option(
    "--base-rate",
    type=float,
    metavar="B",
    help="Share of outliers that AUPR is stated for  [default: each set's own]",
)
@click.option("--limit", type=int, metavar="N", help="Take a sample of N images of each set.")
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    metavar="S",
    help="Of --limit and the batches.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(("table", "json")),
    default="table",
    show_default=True,
    help="What to print.",
)
@click.option("--report", type=PATH, metavar="FILE.html", help="Write a page with figures.")
@click.option(
    "--thumbnails/--no-thumbnails",
    default=True,
    help="Whether images stand in the report  [default: yes]",
)
@device
def evaluate(
    bundle: Path,
    normal: str,
    outliers: tuple[str, ...],
    labels: bool,
    baseline: Path | None,
    label_alpha: float | None,
    reject_cost: float | None,
    priors: tuple[str, ...],
    alpha: float | None,
    fdr: float | None,
    base_rate: float | None,
    limit: int | None,
    seed: int,
    kind: str,
    report: Path | None,
    thumbnails: bool,
    device: str,
) -> int:
    """Measure false alarms on normal images, and what is caught of outliers."""
    named = _named(outliers)
    from anomalyd.detect.bundle import read_bundle
    from anomalyd.detect.detector import Detector
    from anomalyd.detect.evaluate import Baseline
    from anomalyd.detect.evaluate import evaluate as run
    from anomalyd.detect.report import check_report, write_report
    from anomalyd.detect.terminal import print_evaluation
    from anomalyd.sources import open_evaluation, open_source

    if report is not None:
        check_report(report)

    detector = Detector.load(bundle, device=device)
    detector.alpha(alpha)
    asked = detector.labelling(label_alpha, reject_cost, _priors(priors))
    if labels and not detector.labels:
        raise UsageError(f"--labels: bundle {bundle} gives no labels; train one with --labels")
    of_labels = {
        "--baseline": baseline is not None,
        "--label-alpha": label_alpha is not None,
        "--reject-cost": reject_cost is not None,
        "--prior": bool(priors),
    }
    for option, wanted in of_labels.items():
        if wanted and not labels:
            raise UsageError(f"{option} is about labels; add --labels")
    beside = None
    if baseline is not None:
        beside = Baseline(read_bundle(baseline), detector, device=device)
    given = open_evaluation(normal, labels=labels)
    sets = dict(given.outliers)
    for name, data in named.items():
        if name in sets:
            raise UsageError(f"--outliers {name}: {normal} has a set of that name already")
        sets[name] = open_source(data)
    sizes = [len(given.normal), *map(len, sets.values())]
    total = sum(sizes if limit is None else (min(limit, size) for size in sizes))
    with _progress("evaluating", total) as advance:
        result = run(
            detector,
            given.normal,
            sets,
            masks=given.masks,
            alpha=alpha,
            fdr=fdr,
            base_rate=base_rate,
            limit=limit,
            seed=seed,
            labelling=asked if labels else None,
            baseline=beside,
            progress=advance,
        )
    _name_unreadable(result.unreadable)
    for name, seen in result.seen.items():
        if seen:
            where = "seen in training or calibration"
            _say(f"{name}: {len(seen)} images left out, {where}: {_some(seen)}")
    for warning in result.warnings:
        _say(f"warning: {warning}")
    if kind == "json":
        _print_json(result.to_dict())
    else:
        print_evaluation(result)
    if report is not None:  # last: where it cannot be written, the evaluation is not lost
        write_report(report, result, detector, masks=given.masks, thumbnails=thumbnails)
        _say(f"{report} written")
    return UNREADABLE if result.unreadable else 0


@anomalyd.command()
@bundle
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@alpha
@click.option(
    "--fdr",
    type=float,
    metavar="Q",
    help="Flag so that at most a share Q of what is flagged is false (Benjamini-Hochberg).",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(("table", "jsonl", "csv")),
    default="table",
    show_default=True,
    help="What to print.",
)
@click.option(
    "--output",
    metavar="FILE|FOLDER",
    help="Write .parquet, .jsonl or .csv, or with --engine ray a folder of Parquet parts; "
    "print nothing.",
)
@click.option(
    "--heatmaps",
    type=PATH,
    metavar="DIR",
    help="One PNG an image: where it is odd. Nothing is promised of maps, only of verdicts.",
)
@click.option(
    "--flips", is_flag=True, help="Average those maps over four flips, four times as slow."
)
@click.option("--explain", is_flag=True, help="Add each statistic's value and p-value.")
@labelling
@device
@click.option("--resume", is_flag=True, help="Go on where an interrupted --output stopped.")
@click.option(
    "--engine",
    type=click.Choice(("local", "ray")),
    default="local",
    show_default=True,
    help="Score in this process, or with the actors of a Ray cluster.",
)
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="HOST:PORT of the cluster, or auto  [default: RAY_ADDRESS, else this machine]",
)
def score(
    bundle: Path,
    paths: tuple[str, ...],
    alpha: float | None,
    fdr: float | None,
    kind: str,
    output: str | None,
    heatmaps: Path | None,
    flips: bool,
    explain: bool,
    label_alpha: float | None,
    reject_cost: float | None,
    priors: tuple[str, ...],
    device: str,
    resume: bool,
    engine: str,
    ray_address: str | None,
) -> int:
    """Judge every image in PATH... and print one verdict an image, in order."""
    from anomalyd.detect.detector import Detector
    from anomalyd.detect.output import file_format
    from anomalyd.detect.score import Scoring, score_to_file, score_to_stream
    from anomalyd.sources import listed, open_paths
    from anomalyd.stores import is_uri

    if engine == "ray":
        if heatmaps is not None or flips:
            option = "--flips" if heatmaps is None else "--heatmaps"
            raise UsageError(f"{option}: maps are drawn by the local engine; leave it out")
        if not output:
            raise UsageError("--engine ray writes a folder of parts; name it with --output")
        wishes = (label_alpha, reject_cost, _priors(priors))
        return _score_on_ray(
            bundle, paths, output, alpha, fdr, explain, wishes, device, ray_address
        )
    if ray_address is not None:
        raise UsageError("--ray-address is for --engine ray; add that")
    if resume and output is None:
        raise UsageError("--resume goes on with a file; name it with --output")
    if output is not None:
        if is_uri(output):
            raise UsageError(f"--output {output}: a store is written by --engine ray; add that")
        written = file_format(Path(output))
        if kind not in ("table", written):
            raise UsageError(
                f"--format {kind}: --output {output} is written as its name ends; leave one of "
                "them out"
            )
    detector = Detector.load(bundle, device=device)
    asked = detector.labelling(label_alpha, reject_cost, _priors(priors))
    scoring = Scoring(
        detector.alpha(alpha),
        asked if detector.labels else None,
        fdr=fdr,
        explain=explain,
        heatmaps=heatmaps,
        flips=flips,
    )
    source = open_paths(listed(paths))
    _say_fdr(detector, fdr, len(source))
    with _progress("scoring", len(source)) as advance:
        if output is None:
            summary = score_to_stream(
                detector, source, scoring, kind, sys.stdout.buffer, progress=advance
            )
        else:
            summary = score_to_file(
                detector, source, scoring, Path(output), resume=resume, progress=advance
            )
    return _say_summary(detector, summary, scoring.alpha, fdr)


def _score_on_ray(
    bundle: Path,
    paths: tuple[str, ...],
    output: str,
    alpha: float | None,
    fdr: float | None,
    explain: bool,
    wishes: tuple[float | None, float | None, dict[str, float]],
    device: str,
    address: str | None,
) -> int:
    """The same verdicts by the actors of a cluster; the same command again goes on."""
    import hashlib

    from anomalyd.detect.detector import Detector
    from anomalyd.detect.manifest import dump_manifest
    from anomalyd.detect.score import Scoring
    from anomalyd.scale.cluster import cluster, require
    from anomalyd.scale.plan import Question, make_plan, read_plan
    from anomalyd.scale.score import finished
    from anomalyd.scale.score import score as run
    from anomalyd.sources import listed, open_paths
    from anomalyd.stores import open_store

    require()
    detector = Detector.load(bundle, device="cpu")
    asked = detector.labelling(*wishes) if detector.labels or any(wishes) else None
    scoring = Scoring(detector.alpha(alpha), asked, fdr=fdr, explain=explain)
    digest = hashlib.sha256(dump_manifest(detector.manifest)).hexdigest()
    named = listed(paths)
    question = Question(digest, named, os.getcwd(), scoring.alpha, fdr, explain, asked)
    store = open_store(output)
    parts = read_plan(store, question)
    done = None if parts is None else finished(store)
    if parts is None:
        parts = make_plan(store, question, open_paths(named))
    images = sum(part.count for part in parts)
    _say_fdr(detector, fdr, images)
    if done is None:
        with cluster(address) as ray, _progress("scoring", images) as advance:
            done = run(ray, detector, question, parts, store, device=device, progress=advance)
    return _say_summary(detector, done, scoring.alpha, fdr)


def _say_fdr(detector: Any, fdr: float | None, images: int) -> None:
    from anomalyd.detect.score import check_fdr

    if fdr is not None:
        fewest = check_fdr(detector, fdr, images)
        _say(f"--fdr {fdr:g}: on average over batches at most {fdr:g} of the flags are false")
        _say(
            f"with {detector.calibrated_on:,} calibration and {images:,} batch images "
            f"no fewer than {fewest:,} flags are possible, or none"
        )


def _say_summary(detector: Any, summary: Any, alpha: float, fdr: float | None) -> int:
    if summary.unreadable == summary.images:
        raise AnomalydError(f"none of {summary.images} inputs could be read")
    if warning := detector.size_warning(summary.unfamiliar):
        _say(warning)
    rule = f"alpha {alpha:g}" if fdr is None else f"a false discovery rate of {fdr:g}"
    said = f"{summary.images} images, {summary.outliers} outliers at {rule}"
    if summary.ambiguous:
        said += f", {summary.ambiguous} ambiguous"
    if summary.unreadable:
        said += f", {summary.unreadable} could not be read"
    _say(said)
    return UNREADABLE if summary.unreadable else 0


@anomalyd.command()
@bundle
@click.option(
    "-n",
    "count",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Images to draw, up to 10,000  [default: 16; with --complete 8]",
)
@click.option("--label", metavar="NAME", help="Draw images of this class.")
@click.option("--seed", type=SEED, default=0, show_default=True, metavar="S", help="Of the draw.")
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    metavar="T",
    help="Exact samples at 1, tamer ones below.",
)
@click.option(
    "--complete", type=PATH, metavar="IMAGE", help="Draw the rest of this image, eight times."
)
@click.option(
    "--keep",
    metavar="PART",
    help="What is kept of it: top-quarter, top-half or top-three-quarters  [default: top-half]",
)
@click.option(
    "--method",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="loop, jacobi or cached: the same images; auto is the fastest.",
)
@click.option(
    "--output",
    type=PATH,
    default="grid.png",
    show_default=True,
    metavar="FILE",
    help="PNG to write.",
)
@device
def sample(
    bundle: Path,
    count: int | None,
    label: str | None,
    seed: int,
    temperature: float,
    complete: Path | None,
    keep: str | None,
    method: str,
    output: Path,
    device: str,
) -> int:
    """Draw images from the density in BUNDLE, or the rest of an image given its top."""
    import numpy as np

    from anomalyd.detect.output import check_place, whole
    from anomalyd.detect.sample import Sampler, grid
    from anomalyd.images import to_pixels

    if keep is not None and complete is None:
        raise UsageError(f"--keep {keep}: only an image to complete is kept; add --complete IMAGE")
    keep = keep or "top-half"
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output {output}: samples are written as .png")
    check_place("--output", output)
    sampler = Sampler.load(bundle, device=device)
    # Refused before the image is read.
    kept = None if complete is None else sampler.kept(keep)
    try:
        given = None if complete is None else to_pixels(complete, sampler.spec)
    except ImageError as error:
        raise AnomalydError(f"--complete {complete}: {error}") from error
    with _progress("drawing", sampler.steps) as advance:
        before = 0

        def progress(done: int, _: int) -> None:
            nonlocal before
            advance(done - before)
            before = done

        drawn = sampler.draw(
            count if count is not None else 16 if given is None else 8,
            label=label,
            seed=seed,
            temperature=temperature,
            method=method,
            complete=given,
            keep=keep,
            progress=progress,
        )
    images, columns = drawn.images, None
    if given is not None and kept is not None:
        # Side by side: the image, what was kept of it on grey, and its completions.
        top = np.where(kept, given, np.uint8(128))
        images = np.concatenate([given[None], top[None], images])
        columns = len(images)
    with whole("--output", output) as new:
        grid(images, columns=columns).save(new, format="png")
    labels = f" of {', '.join(sorted(set(drawn.labels)))}" if drawn.labels else ""
    _say(f"{output}: {len(drawn.images)} images{labels}, drawn by {drawn.method}, seed {seed}")
    return 0


@anomalyd.command()
@bundle
@click.argument("data")
@click.option(
    "--output",
    type=PATH,
    required=True,
    metavar="FILE",
    help="Write .parquet, .jsonl or .csv.",
)
@device
def embed(bundle: Path, data: str, output: Path, device: str) -> int:
    """Write the features that the encoder of BUNDLE finds in every image in DATA, in order."""
    from anomalyd.detect.embed import embed as run
    from anomalyd.detect.embed import open_labelled

    source = open_labelled(data)
    with _progress("embedding", len(source)) as advance:
        done = run(bundle, source, output, device=device, progress=advance)
    if done.unreadable == done.images:
        first = f"; the first says: {done.reason}" if done.reason else ""
        raise AnomalydError(f"none of {done.images} inputs could be read{first}")
    unreadable = f", {done.unreadable} could not be read" if done.unreadable else ""
    _say(f"{output}: {done.images} images, {done.features} numbers each{unreadable}")
    return UNREADABLE if done.unreadable else 0


@anomalyd.group("bundle")
def bundles() -> None:
    """Look into bundles and check them."""


@bundles.command()
@click.argument("bundles", nargs=-1, required=True, type=PATH, metavar="BUNDLE...")
@click.option(
    "--format",
    "kind",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    help="What to print; json gives one manifest a line.",
)
def inspect(bundles: tuple[Path, ...], kind: str) -> None:
    """Say what each BUNDLE is, what it promises and what it holds."""
    from anomalyd.detect.bundle import read_bundle
    from anomalyd.detect.terminal import description

    for number, path in enumerate(bundles):
        content = read_bundle(path)
        if kind == "json":
            _print_json(content.manifest)
        else:
            click.echo(("\n" if number else "") + description(content))


@bundles.command()
@click.argument("bundles", nargs=-1, required=True, type=PATH, metavar="BUNDLE...")
@device
def verify(bundles: tuple[Path, ...], device: str) -> int:
    """Check every file of each BUNDLE, and that its graph gives the golden numbers here."""
    from anomalyd.detect.bundle import read_bundle
    from anomalyd.detect.detector import Detector
    from anomalyd.detect.golden import open_session

    code = 0
    for path in bundles:
        try:
            content = read_bundle(path)
            for name in content.graphs:
                content.graph(name)
            session = open_session(content, device=device)
            if content.manifest.kind == "density":
                Detector(content, session)  # this version knows its score
        except BundleError as error:
            code = _fail(str(error), error.exit_code)
        else:
            files, images = len(content.manifest.files), len(content.golden.images)
            click.echo(
                f"{path}: good, {files} files, {images} golden scores on {session.provider}"
            )
    return code


class _Serving(click.Command):
    """A command whose options are those of ServeSettings, read when they are needed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not self.params:
            from anomalyd.config import options
            from anomalyd.serve.settings import ServeSettings

            @click.command()
            @click.argument("bundles", nargs=-1, metavar="[BUNDLE_OR_FOLDER]...")
            @options(ServeSettings)
            @click.option(
                "--config", type=PATH, metavar="FILE", help="TOML file with these settings."
            )
            def template(**_: Any) -> None: ...

            self.params = template.params
        return super().get_params(ctx)


def _serve(config: Path | None, **flags: Any) -> int:
    from anomalyd.config import load
    from anomalyd.serve.server import main as serve
    from anomalyd.serve.settings import ServeSettings

    serve(load(ServeSettings, flags=flags, env="ANOMALYD_SERVE_", file=config))
    return 0


def _check(config: Path | None, **flags: Any) -> int:
    from anomalyd.config import load
    from anomalyd.detect.bundle import read_bundle
    from anomalyd.serve.repository import scan
    from anomalyd.serve.server import check
    from anomalyd.serve.settings import ServeSettings

    settings = load(ServeSettings, flags=flags, env="ANOMALYD_SERVE_", file=config)
    access = check(settings)
    code, good = 0, set()
    for found in scan(settings.bundles):
        try:
            kind = read_bundle(found.path).manifest.kind
        except AnomalydError as error:
            code = _fail(str(error), FAILED)
        else:
            served = kind == "density"
            good |= {found.key.name} if served else set()
            state = "good" if served else f"not served, for it is of kind {kind}"
            click.echo(f"{found.key.name} {found.key.version}: {state} ({found.path})")
    if settings.default_model is not None and settings.default_model not in good:
        there = ", ".join(sorted(good)) or "none"
        raise UsageError(
            f"--default-model {settings.default_model}: not served; there are {there}"
        )
    if not good:
        return _fail(f"{', '.join(settings.bundles)}: no density there that can be served", FAILED)
    if access is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
        _say(f"anyone who reaches {settings.host} may ask; --tokens FILE lets in who has a token")
    return code


@anomalyd.group(name="config")
def config_group() -> None:
    """Check what `serve` would be told."""


config_group.add_command(
    _Serving(
        "check",
        callback=_check,
        help="Check settings, files and bundles as `serve` takes them, without serving.\n\n"
        "Reads flags, ANOMALYD_SERVE_NAME and --config like `serve`, verifies tokens, "
        "certificates and every bundle, and exits with 0 only if all is well.",
    )
)

anomalyd.add_command(
    _Serving(
        "serve",
        callback=_serve,
        help="Serve bundles over HTTP: those named, or every one in ./trained.\n\n"
        "A setting is taken from its flag, else ANOMALYD_SERVE_NAME, else --config.",
    )
)


def _training() -> ModuleType:
    try:
        from anomalyd.train import commands
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "anomalyd":
            raise
        raise MissingExtra(package, "train") from error
    return commands


def _named(outliers: tuple[str, ...]) -> dict[str, str]:
    named: dict[str, str] = {}
    for text in outliers:
        name, equals, data = text.partition("=")
        if not (name and equals and data):
            raise UsageError(f"--outliers {text}: say NAME=DATA, as in mnist=data/mnist:test")
        if name in named or name == "normal":
            why = "given twice" if name in named else "that is the normal images' name"
            raise UsageError(f"--outliers {name}: {why}; each set needs a name of its own")
        named[name] = data
    return named


def _priors(given: tuple[str, ...]) -> dict[str, float]:
    from anomalyd.detect.bayes import named_priors

    return named_priors(given)


def _fail(message: str, code: int) -> int:
    # A message from far below may hold a line break; the promise is one line.
    click.echo(f"anomalyd: {printable(' '.join(message.split()))}", err=True)
    return code


def _say(message: str) -> None:
    click.echo(printable(message), err=True)


def _name_unreadable(unreadable: list[tuple[str, str]]) -> None:
    for name, why in unreadable:
        _say(f"{name}: {why}")


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr, on a terminal only; yields what to call with the images done."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _print_json(value: object) -> None:
    import msgspec

    click.echo(msgspec.json.encode(value))
