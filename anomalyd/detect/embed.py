"""What a bundle's encoder makes of images: one vector each, for whoever has a use for features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anomalyd.detect.bundle import read_bundle
from anomalyd.detect.golden import open_session
from anomalyd.detect.output import Row, file_format, write_file
from anomalyd.detect.pipeline import Slab, item_name, scored
from anomalyd.errors import BundleError, SourceError
from anomalyd.sources import open_paths, open_source

if TYPE_CHECKING:
    from anomalyd.sources import Source

__all__ = ["COLUMNS", "Embedded", "embed", "open_labelled"]

COLUMNS = ("source", "index", "label", "embedding", "error")


@dataclass
class Embedded:
    """What `embed` did.

    Attributes:
        features: numbers in a vector.
        images: rows written, one an input.
        unreadable: rows that have an error in place of a vector.
        reason: the first of these errors, as `name: reason`; empty without.
    """

    features: int
    images: int = 0
    unreadable: int = 0
    reason: str = ""


def open_labelled(data: str | Path) -> Source:
    """The images that a DATA argument names, with their classes where all of them have one.

    Raises:
        SourceError: there is no such thing, nothing in it can be read, or the split is unclear.
        MissingExtra: Parquet without pyarrow.
    """
    try:
        open_source(data, labels=True)
    except SourceError:
        return open_paths([data])
    return open_paths([data], labels=True)  # and what breaks off half way is named


def embed(
    path: str | Path,
    source: Source,
    output: Path,
    *,
    device: str = "auto",
    progress: Callable[[int], object] = lambda _: None,
) -> Embedded:
    """Write the embedding of every image, in order, to a file that appears whole or not at all.

    Args:
        path: a bundle of any kind whose graph has the output `embedding`.
        source: the images; those that cannot be read get a row with the reason.
        output: ends in .parquet (`embedding` is a list of E float32), .jsonl (likewise) or .csv
            (columns embedding_0 to embedding_{E-1}).
        device: as for `Detector.load`.
        progress: called with the number of images done.

    Raises:
        BundleError: the bundle is broken or has no encoder.
        UsageError: another ending.
        MissingExtra: Parquet without pyarrow.
        AnomalydError: the disk refuses.
    """
    kind = file_format(output)
    bundle = read_bundle(path)
    if "embedding" not in bundle.manifest.outputs:
        raise BundleError(
            f"bundle {path}: its graph has no encoder (embedding); classifiers, autoencoders and "
            "those densities that have one, such as a VAE, do"
        )
    session = open_session(bundle, device=device)
    probe = session.run(bundle.golden.images[:1]).embedding
    done = Embedded(0 if probe is None else probe.size)

    def rows() -> Iterator[Row]:
        for slab in scored(session, bundle.manifest.image, source):
            yield from _rows(slab, done.features)
            done.images += len(slab.items)
            done.unreadable += len(slab.errors)
            if slab.errors and not done.reason:
                place = min(slab.errors)
                done.reason = f"{item_name(slab.items[place])}: {slab.errors[place]}"
            progress(len(slab.items))

    write_file(output, kind, COLUMNS, rows(), features=done.features)
    return done


def _rows(slab: Slab, features: int) -> list[Row]:
    rows: list[Row] = [{"source": item.source, "index": item.index} for item in slab.items]
    for row, item in zip(rows, slab.items, strict=True):
        if item.label is not None:
            row["label"] = item.label
    for place, error in slab.errors.items():
        rows[place]["error"] = str(error)
    if slab.raw is None:
        return rows
    vectors = slab.raw.embedding
    if vectors is None or vectors.shape != (len(slab.readable), features):
        raise BundleError(
            f"model.onnx: embedding must have the shape (N, {features}) on every batch, not "
            f"{None if vectors is None else vectors.shape}; export the bundle again"
        )
    for place, vector in zip(slab.readable.tolist(), vectors, strict=True):
        rows[place]["embedding"] = vector
    return rows
