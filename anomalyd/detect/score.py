"""The batch command: sources to rows of verdicts, streamed in the order of the inputs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from anomalyd.detect import conformal
from anomalyd.detect.bayes import AMBIGUOUS, NOVEL, Labelling
from anomalyd.detect.heatmap import heatmap_png
from anomalyd.detect.manifest import dump_manifest
from anomalyd.detect.output import (
    ROWS_AT_A_TIME,
    Journal,
    Row,
    columns,
    file_format,
    make_writer,
)
from anomalyd.detect.pipeline import Slab, scored
from anomalyd.errors import AnomalydError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.detect.detector import Detector
    from anomalyd.sources import Item, Source

    Floats = NDArray[np.float64]

__all__ = ["Scoring", "Summary", "check_fdr", "score_rows", "score_to_file", "score_to_stream"]


@dataclass(frozen=True)
class Scoring:
    """What is asked of every image.

    Attributes:
        alpha: rate of false alarms, from `Detector.alpha`.
        labelling: what is asked of labels, from `Detector.labelling`; None where verdicts have
            none.
        fdr: flag by Benjamini-Hochberg at this share of false flags; None flags by alpha.
        explain: add each statistic's value and p-value.
        heatmaps: folder for one PNG an image; None makes none.
        flips: average those maps over four flips of the image.

    Raises:
        UsageError: an fdr outside (0, 1), flips without maps.
    """

    alpha: float
    labelling: Labelling | None = None
    fdr: float | None = None
    explain: bool = False
    heatmaps: Path | None = None
    flips: bool = False

    def __post_init__(self) -> None:
        if self.fdr is not None and not 0 < self.fdr < 1:
            raise UsageError(f"--fdr must lie between 0 and 1, not {self.fdr:g}; try 0.1")
        if self.flips and self.heatmaps is None:
            raise UsageError("--flips averages maps; say where they go with --heatmaps DIR")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a table of these rows."""
        labels = self.labelling is not None
        return columns(fdr=self.fdr is not None, labels=labels, explain=self.explain)


@dataclass
class Summary:
    """Counts over all rows.

    Attributes:
        images: all of them.
        outliers: flagged; of bundles with classes those that fit none.
        ambiguous: not outliers, and without a label, for they fit several classes.
        unreadable: with an error in place of a verdict.
        unfamiliar: smaller or larger than any image calibrated on.
    """

    images: int = 0
    outliers: int = 0
    ambiguous: int = 0
    unreadable: int = 0
    unfamiliar: int = 0

    def add(self, rows: Iterable[Row]) -> None:
        """Count rows."""
        for row in rows:
            self.images += 1
            if "error" in row:
                self.unreadable += 1
            elif row["outlier"]:
                self.outliers += 1
            elif row.get("reason") == AMBIGUOUS:
                self.ambiguous += 1


def check_fdr(detector: Detector, fdr: float, images: int) -> int:
    """The fewest flags that a batch can have, if any, at a false discovery rate.

    Args:
        detector: the bundle.
        fdr: in (0, 1).
        images: of the batch.

    Raises:
        AlphaUnreachable: not even if all of them were flagged: the calibration set is too small.
    """
    n, confidence = detector.calibrated_on, detector.confidence
    conformal.check_alpha(fdr, n, confidence, what="--fdr")
    return conformal.fewest_flags(fdr, n, images, confidence)


def score_to_stream(
    detector: Detector,
    source: Source,
    scoring: Scoring,
    kind: str,
    stream: IO[bytes],
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> Summary:
    """Score a source and write rows to a stream as they come; with an fdr, all at the end.

    Args:
        detector: the bundle.
        source: the images.
        scoring: what is asked of each.
        kind: "table", "jsonl" or "csv".
        stream: standard output, say.
        progress: called with the number of images done.
    """
    writer = make_writer(kind, stream, scoring.columns)
    summary = Summary()
    rows = score_rows(detector, source, scoring, summary, progress=progress)
    if scoring.fdr is not None:
        rows = _after_the_last(rows, scoring.fdr, detector.calibration.levels)
    for slab in rows:
        summary.add(slab)
        writer.write(slab)
        stream.flush()
    writer.close()
    stream.flush()
    return summary


def score_to_file(
    detector: Detector,
    source: Source,
    scoring: Scoring,
    path: Path,
    *,
    resume: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> Summary:
    """Score a source into a file that appears whole or not at all.

    Args:
        detector: the bundle.
        source: the images.
        scoring: what is asked of each.
        path: ends in .parquet, .jsonl or .csv.
        resume: go on after the rows that an interrupted run left in `path`.part.
        progress: called with the number of images done.

    Raises:
        UsageError: another ending, or a journal of other options or other images.
        MissingExtra: Parquet without pyarrow.
        AnomalydError: the disk refuses.
    """
    kind = file_format(path)
    summary = Summary()
    with Journal(path, _header(detector, scoring), resume=resume) as journal:
        items = iter(source)
        _skip(items, journal)
        progress(journal.count)
        first = journal.count
        for rows in score_rows(detector, items, scoring, summary, first=first, progress=progress):
            journal.write(rows)
        final = _final(journal, scoring.fdr, detector.calibration.levels)
        journal.finish(kind, scoring.columns, _counted(final, summary))
    return summary


def score_rows(
    detector: Detector,
    items: Iterable[Item],
    scoring: Scoring,
    summary: Summary,
    *,
    first: int = 0,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Iterator[list[Row]]:
    """The row of every item, in their order, some at a time; verdicts by alpha, not by fdr.

    Args:
        detector: the bundle.
        items: any number, read as they are needed.
        scoring: what is asked of each.
        summary: its `unfamiliar` is counted here.
        first: how many items came before, for the names of maps.
        workers: decoding threads; None takes what this process may use.
        progress: called with the number of images done.
    """
    maps = scoring.heatmaps
    if maps is not None:
        _make_folder(detector, maps)
    for slab in scored(
        detector.session,
        detector.spec,
        items,
        texture=detector.texture,
        nll_map=maps is not None,
        flips=scoring.flips,
        workers=workers,
    ):
        # Before its rows are journaled: a resumed run goes on behind them.
        if maps is not None:
            _write_maps(slab, maps, first)
        yield _slab_rows(detector, slab, scoring)
        summary.unfamiliar += 0 if slab.raw is None else detector.unfamiliar(slab.raw)
        first += len(slab.items)
        progress(len(slab.items))


def _slab_rows(detector: Detector, slab: Slab, scoring: Scoring) -> list[Row]:
    rows: list[Row] = [{"source": item.source, "index": item.index} for item in slab.items]
    for place, error in slab.errors.items():
        rows[place]["error"] = str(error)
    if slab.raw is None:
        return rows
    # At a false discovery rate what is novel is known at the end: until then each has a label.
    alpha = scoring.alpha if scoring.fdr is None else 0.0
    judged = detector.columns(slab.raw, alpha, scoring.labelling or Labelling())
    likelihood, name = detector.manifest.likelihood, detector.manifest.score_name
    for place, said, bits, score, p_value, outlier in zip(
        slab.readable.tolist(),
        detector.said(judged),
        judged.bits_per_dim.tolist(),
        judged.score.tolist(),
        judged.p_value.tolist(),
        judged.outlier.tolist(),
        strict=True,
    ):
        row = rows[place]
        row["bits_per_dim"] = bits
        row["likelihood"] = likelihood
        row["score"] = score
        row["score_name"] = name
        row["p_value"] = p_value
        row["alpha"] = scoring.alpha
        row["outlier"] = outlier
        row |= said
    if scoring.explain:
        for i, place in enumerate(slab.readable):
            rows[place]["explain"] = detector.explain(slab.raw, i)
    return rows


def _after_the_last(slabs: Iterable[list[Row]], fdr: float, levels: Floats) -> Iterator[list[Row]]:
    """The same rows with q-values, which need every p-value: they wait on disk meanwhile."""
    with (
        tempfile.TemporaryDirectory(prefix="anomalyd-") as folder,
        Journal(Path(folder) / "rows", {}) as journal,
    ):
        for slab in slabs:
            journal.write(slab)
        decided = _final(journal, fdr, levels)
        while chunk := list(islice(decided, ROWS_AT_A_TIME)):
            yield chunk


def _decided(rows: Iterable[Row], levels: Floats, q_table: Floats, fdr: float) -> Iterator[Row]:
    for row in rows:
        if "error" not in row:
            q_value = float(q_table[conformal.ranks(row["p_value"], levels)])
            row["outlier"] = q_value <= fdr
            row["q_value"] = q_value
            if row["outlier"] and "label" in row:
                row |= {"label": None, "rejected": True, "reason": NOVEL}
        yield row


def _final(journal: Journal, fdr: float | None, levels: Floats) -> Iterator[Row]:
    if fdr is None:
        return journal.rows()
    counts = np.zeros(len(levels), np.int64)
    for row in journal.rows():
        if "error" not in row:
            counts[conformal.ranks(row["p_value"], levels)] += 1
    return _decided(journal.rows(), levels, conformal.q_table(counts, levels), fdr)


def _counted(rows: Iterable[Row], summary: Summary) -> Iterator[Row]:
    for row in rows:
        summary.add([row])
        yield row


def _header(detector: Detector, scoring: Scoring) -> Row:
    """Everything that decides what a row says."""
    digest = hashlib.sha256(dump_manifest(detector.manifest)).hexdigest()
    header: Row = {
        "bundle": digest,
        "alpha": scoring.alpha,
        "explain": scoring.explain,
        # Until the last p-value is known nothing is an outlier, and every image has a label.
        "fdr": scoring.fdr is not None,
        # Maps of rows that are journaled already would be missing.
        "heatmaps": None if scoring.heatmaps is None else str(scoring.heatmaps.absolute()),
        "flips": scoring.flips,
    }
    if scoring.labelling is not None:
        header["labelling"] = asdict(scoring.labelling)
    return header


def _skip(items: Iterator[Item], journal: Journal) -> None:
    if journal.last is None:
        return
    item = next(islice(items, journal.count - 1, None), None)
    if item is None or (item.source, item.index) != (
        journal.last["source"],
        journal.last["index"],
    ):
        raise UsageError(
            f"--resume: row {journal.count} of {journal.part} is {journal.last['source']}, and "
            f"the inputs have {item.source if item else 'none'} there; start without --resume"
        )


def _make_folder(detector: Detector, folder: Path) -> None:
    if "nll_map" not in detector.session.outputs:
        raise UsageError(
            f"--heatmaps: bundle {detector.path} has no per-pixel map (nll_map); leave it out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnomalydError(f"--heatmaps {folder}: cannot be made: {error.strerror}") from error


def _write_maps(slab: Slab, folder: Path, first: int) -> None:
    """ROW-NAME.png for each readable image, ROW counting inputs from 0.

    Of a long NAME the first 160 bytes: that is what file systems count, and at most 255.
    """
    if slab.raw is None or slab.raw.nll_map is None:
        return
    try:
        for i, place in enumerate(slab.readable.tolist()):
            item = slab.items[place]
            index = "" if item.index is None else f"-{item.index}"
            name = Path(item.source).stem.encode()[:160].decode(errors="ignore")
            path = folder / f"{first + place:06d}-{name}{index}.png"
            part = path.with_suffix(".part")
            part.write_bytes(heatmap_png(slab.pixels[i], slab.raw.nll_map[i]))
            os.replace(part, path)
    except OSError as error:
        raise AnomalydError(f"--heatmaps {folder}: cannot be written: {error.strerror}") from error
