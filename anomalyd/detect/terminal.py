"""Evaluations and bundles as text, for a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomalyd.detect.conformal import round_up

if TYPE_CHECKING:
    from anomalyd.detect.bundle import Bundle
    from anomalyd.detect.classification import Classification
    from anomalyd.detect.evaluate import Evaluated

__all__ = ["description", "print_evaluation", "promise"]


def promise(confidence: float | None) -> str:
    """Return the promise of a calibration in words."""
    if confidence is None:
        return "false alarms at most alpha on average over calibration sets"
    return f"false alarms at most alpha with {confidence:.4g} confidence over the calibration set"


def print_evaluation(result: Evaluated) -> None:
    """Write what an evaluation found on stdout: a line or two, and its tables."""
    # Piped, a table is as wide as it needs; on a terminal it folds.
    width = None if sys.stdout.isatty() else 10_000
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    level = result.level
    low, high = level.band
    console.print(
        f"{result.bundle}: {result.bits_per_dim:.4f} bits/dim ({result.likelihood}) "
        f"on {len(result.normal):,} normal images"
    )
    console.print(
        f"false alarms {level.observed:.4f} at alpha {level.alpha:g}; "
        f"99.9 % of such runs fall in [{low:.4f}, {high:.4f}]"
    )
    if result.classification is not None:
        _print_classification(console, result.classification)
    if not result.outliers:
        return
    console.print(_table(*_verdict_rows(result)))
    if len(result.normal.scores) > 1:
        console.print()
        console.print(_table(*_score_rows(result)))
    console.print()
    console.print(_table(*_batch_rows(result)))


def _print_classification(console: Console, found: Classification) -> None:
    console.print(
        f"accepted {found.accepted:.4f} of the normal images, {found.accepted_accuracy:.4f} of "
        f"them rightly labelled; mean set size {found.set_size:.3f} at label alpha "
        f"{found.label_alpha:g}"
    )
    rows = [("bundle", found.labels)]
    if found.baseline is not None:
        rows.append((str(found.baseline_name), found.baseline))
    headings = ["labels", "accuracy", "NLL", "ECE", "AURC", "AUGRC", "coverage at 1 % risk"]
    mixed = list(found.labels.mixed)
    headings += [f"AURC with {name}" for name in mixed]
    console.print(
        _table(
            headings,
            [
                [
                    name,
                    f"{each.accuracy:.4f}",
                    f"{each.nll:.4f}",
                    f"{each.ece:.4f}",
                    f"{each.aurc:.5f}",
                    f"{each.augrc:.5f}",
                    f"{each.coverage_at_1pct_risk:.4f}",
                    *(f"{each.mixed[other][0]:.4f}" for other in mixed),
                ]
                for name, each in rows
            ],
        )
    )
    console.print()
    console.print(
        _table(
            ["rejected", "novel", "ambiguous", "either"],
            [
                [name, f"{each.novel:.4f}", f"{each.ambiguous:.4f}", f"{each.rejected:.4f}"]
                for name, each in {"normal": found.normal, **found.outliers}.items()
            ],
        )
    )
    console.print()
    console.print(
        _table(
            ["class", "images", "accuracy", "coverage", "called novel", "at most"],
            [
                [
                    name,
                    f"{each.n:,}",
                    f"{each.accuracy:.4f}",
                    f"{each.coverage:.4f}",
                    f"{each.novel:.4f}",
                    f"{each.at_most:.4f}",
                ]
                for name, each in found.classes.items()
            ],
        )
    )
    console.print()


def _verdict_rows(result: Evaluated) -> tuple[list[str], list[list[str]]]:
    """One row a set: what verdicts rest on."""
    level = result.level
    headings = ["outliers", "images", "AUROC", "95 %", "AUPR", "base rate", "FPR95"]
    headings += [f"caught at {level.alpha:g}", "95 %"]
    if result.localisation:
        headings += ["pixel AUROC", "AUPRO"]
    rows = []
    for name, found in result.outliers.items():
        verdict, recall = found.verdict, level.recall[name]
        row = [name, f"{found.n:,}", f"{verdict.auroc:.4f}", _interval(verdict.auroc_ci95)]
        row += [f"{verdict.aupr:.4f}", f"{found.base_rate:.3g}", f"{verdict.fpr95:.4f}"]
        row += [f"{recall.value:.4f}", _interval(recall.ci95)]
        if result.localisation:
            where = found.localisation
            row += [f"{where.pixel_auroc:.4f}", f"{where.aupro:.4f}"] if where else ["", ""]
        rows.append(row)
    return headings, rows


def _score_rows(result: Evaluated) -> tuple[list[str], list[list[str]]]:
    """One row a score: its AUROC on each set."""
    rows = [
        [score, *(f"{found.scores[score].auroc:.4f}" for found in result.outliers.values())]
        for score in result.normal.scores
    ]
    return ["AUROC by score", *result.outliers], rows


def _batch_rows(result: Evaluated) -> tuple[list[str], list[list[str]]]:
    """One row a set: what was flagged in batches with its outliers."""
    headings = [f"flagged by --fdr {result.fdr:g}", "batch", "outliers in it"]
    headings += ["false flags, mean", "standard error", "caught"]
    rows = []
    for name, found in result.outliers.items():
        batches = found.discoveries
        row = [name, f"{batches.batch:,}", f"{batches.outliers:,}", f"{batches.mean_fdp:.4f}"]
        rows.append([*row, f"{batches.standard_error:.4f}", f"{batches.power:.4f}"])
    return headings, rows


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3f} - {ends[1]:.3f}"


def _table(headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def description(content: Bundle) -> str:
    """Return what a bundle is, what it promises and what it holds, a line each."""
    manifest = content.manifest
    image = manifest.image
    lines = {
        "path": content.path,
        "kind": f"{manifest.kind}, {manifest.parameters:,} parameters",
        "images": f"{image.width}x{image.height}x{image.channels}, {image.levels} levels; "
        f"another shape: {image.on_mismatch}",
        "outputs": ", ".join(manifest.outputs),
        **(_density_lines(content) if manifest.kind == "density" else _other_lines(content)),
        "created": manifest.created,
        "licence": manifest.licence,
        "files": ", ".join(
            f"{name} {_size(entry['bytes'])}" for name, entry in sorted(manifest.files.items())
        ),
    }
    if manifest.classes:
        lines["classes"] = ", ".join(manifest.classes)
    title = f"{manifest.name} {manifest.version}"
    return "\n".join([title, *(f"  {key:<11}{value}" for key, value in lines.items())])


def _density_lines(content: Bundle) -> dict[str, str]:
    manifest = content.manifest
    bits = ", ".join(
        f"{value:.4f} on {name}" for name, value in manifest.bits_per_dim.items() if value
    )
    return {
        "likelihood": manifest.likelihood,
        "bits/dim": bits or "not measured",
        "score": manifest.score_name,
        "alpha": f"{round_up(manifest.default_alpha):g} by default, "
        f"{round_up(content.calibration.smallest):g} at the smallest "
        f"({manifest.calibration_n:,} calibration images)",
        "guarantee": promise(manifest.guarantee["confidence"])
        + ", if live normal images are exchangeable with the calibration images",
    }


def _other_lines(content: Bundle) -> dict[str, str]:
    seen, held_out = content.calibration.training_hashes, content.calibration.calibration_hashes
    return {
        "for": "anomalyd embed, anomalyd train --init; it has no density to score by",
        "seen": f"{len(seen):,} images in training, {len(held_out):,} held out",
    }


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
