"""Files that hold many images: IDX, .npy, .npz and Parquet, read image by image.

Opening one reads its header alone; iterating it reads forward, holding one image (of Parquet, a
few rows). A damaged file gives the images before the damage, then a SourceError that names it; of
a Parquet file with a damaged row group that group's rows are items with the error, the others are
read. A Parquet file may lie in a store, under its URI.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from anomalyd.errors import CorruptImage, ImageError, MissingExtra, SourceError
from anomalyd.stores import is_uri, open_store

__all__ = ["Item", "Source", "Want", "open_idx", "open_npy", "open_npz", "open_parquet"]


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, not yet decoded.

    Attributes:
        source: the path of its file, as text that any encoder takes.
        index: its place in that file, from 0, or None where the file is the image.
        payload: the file to read, encoded bytes, or uint8 pixels `(H, W)` or `(H, W, C)`.
        label: its class, if labels were asked for.
        group: what must not be torn apart by a split, if groups were asked for.
        error: why there is no payload; the item stands for what could not be read.
    """

    source: str
    index: int | None
    payload: Path | bytes | NDArray[np.uint8]
    label: str | None = None
    group: str | None = None
    error: ImageError | None = None


class Source(Protocol):
    """A sequence of items that is streamed: it can be iterated again, but holds no image."""

    @property
    def name(self) -> str:
        """What the user called it."""

    def __iter__(self) -> Iterator[Item]: ...

    def after(self, start: int) -> Iterator[Item]:
        """Items from place `start` on; none where the file breaks off before that."""

    def __len__(self) -> int:
        """The number of items that names and headers promise; no image is read for it."""


@dataclass(frozen=True)
class Want:
    """What items carry beyond their image: labels, and groups by a pattern or a column.

    A lenient source of many files has an item with its error for each that cannot be opened.
    """

    labels: bool
    group: str | None
    lenient: bool = False


@dataclass(frozen=True)
class _Array:
    """Images of one shape, one after the other in a file."""

    name: str
    body: Callable[[], IO[bytes]]  # opened at the first image
    shape: tuple[int, ...]  # (N, H, W) or (N, H, W, C)
    labels: Callable[[], Iterable[str]] | None = None
    groups: Callable[[], Iterable[str]] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Item]:
        return self.after(0)

    def after(self, start: int) -> Iterator[Item]:
        count, *shape = self.shape
        size = math.prod(shape)
        labels = repeat(None, count) if self.labels is None else self.labels()
        groups = repeat(None, count) if self.groups is None else self.groups()
        texts = islice(enumerate(zip(labels, groups, strict=True)), start, None)
        with _reading(self.name), self.body() as file:
            if start and not _skip(file, start * size):
                return
            for index, (label, group) in texts:
                data = file.read(size)
                if len(data) != size:
                    raise SourceError(
                        f"{self.name}: the file is truncated: image {index} of {count} is not "
                        "whole; get it again from its source"
                    )
                pixels = np.frombuffer(data, np.uint8).reshape(shape)
                yield Item(self.name, index, pixels, label, group)
            if file.read(1):  # also has gzip and zip verify their checksums
                raise SourceError(f"{self.name}: more data than its header's {count} images")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns what the readers of container files raise into a SourceError that names the file."""
    try:
        yield
    # RuntimeError: an encrypted zip member or an unknown compression; ValueError: a bad header
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        what = " ".join(str(error).split())
        raise SourceError(f"{name}: the file is truncated or damaged: {what}") from error


def _skip(file: IO[bytes], size: int) -> bool:
    """Move on by so many bytes; tell whether the file has them, undamaged."""
    try:
        begin = file.tell()
        end = begin + size
        # At a place one short: only a byte that can be read proves that a plain file reaches it.
        return file.seek(end - 1) == end - 1 and len(file.read(1)) == 1
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile):
        return False


def _image_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise SourceError(
            f"{name}: its shape is {shape}; (N, H, W), (N, H, W, 1) or (N, H, W, 3) is read"
        )
    if 0 in shape:
        raise SourceError(f"{name}: it holds no images: its shape is {shape}")
    if math.prod(shape[1:]) > 1 << 28:
        raise SourceError(f"{name}: images of shape {shape[1:]} are too large to be read")
    return shape


def _text(value: Any) -> str:
    """A label or a group as text."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


# --- IDX: "THE IDX FILE FORMAT" (LeCun, Cortes, Burges), big-endian ---------------------------


def open_idx(path: str, want: Want) -> Source:
    """Returns the images of an IDX file, with the labels of the file beside it."""
    shape = _idx_header(path)
    if len(shape) == 1:
        raise SourceError(f"{path}: it holds labels; give the file of the images")
    _no_group(path, want, "an IDX file")
    _image_shape(path, shape)
    labels = None
    if want.labels:
        labels_path = _idx_labels(path)
        if (there := _idx_header(labels_path)) != shape[:1]:
            raise SourceError(f"{labels_path}: its shape is {there}; {path} has {shape[0]} images")
        labels = lambda: _idx_values(labels_path, shape[0])  # noqa: E731
    return _Array(path, lambda: _idx_body(path), shape, labels)


def _idx_file(path: str) -> IO[bytes]:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if zipped else open(path, "rb")


def _idx_header(path: str) -> tuple[int, ...]:
    with _reading(path), _idx_file(path) as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or not 1 <= magic[3] <= 4:
            raise SourceError(f"{path}: not an IDX file: it starts with {magic!r}")
        if magic[2] != 8:
            raise SourceError(f"{path}: IDX values of type {magic[2]:#04x}; 0x08, bytes, is read")
        sizes = file.read(4 * magic[3])
        if len(sizes) < 4 * magic[3]:
            raise SourceError(f"{path}: the file is truncated within its header")
        return tuple(np.frombuffer(sizes, ">u4").tolist())


def _idx_body(path: str) -> IO[bytes]:
    file = _idx_file(path)
    rank = file.read(4)[3]
    file.read(4 * rank)
    return file


def _idx_labels(path: str) -> str:
    folder, name = os.path.split(path)
    other = re.sub(r"idx[34]", "idx1", name.replace("images", "labels"))
    plain = other.removesuffix(".gz")
    for candidate in (other, plain, plain + ".gz"):
        if candidate != name and os.path.isfile(found := os.path.join(folder, candidate)):
            return found
    raise SourceError(f"{path}: no label file {other} beside it; labels need one")


def _idx_values(path: str, count: int) -> Iterator[str]:
    with _reading(path), _idx_body(path) as file:
        values = file.read(count + 1)
    if len(values) != count:
        there = f"{len(values):,} of" if len(values) < count else "more than"
        raise SourceError(f"{path}: {there} {count:,} labels are there; get it again")
    yield from map(str, values)


def _no_group(path: str, want: Want, what: str) -> None:
    if want.group is not None:
        raise SourceError(f"{path}: {what} has neither paths nor columns to group by")


# --- .npy and .npz: "NEP 1, a simple file format for NumPy arrays" (Kern, 2007) ---------------


def open_npy(path: str, want: Want) -> Source:
    """Returns the images of an .npy file."""
    _no_group(path, want, "an .npy file")
    if want.labels:
        raise SourceError(f"{path}: an .npy file has no labels; use .npz with an array labels")
    with _reading(path), open(path, "rb") as file:
        shape = _npy_images(path, file)

    return _Array(path, lambda: _after_header(path, open(path, "rb")), shape)


def _npy_header(path: str, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise SourceError(f"{path}: .npy format {version}; 1.0 and 2.0 are read")
    if fortran and len(shape) > 1:
        raise SourceError(
            f"{path}: the array is in column order and cannot be read image by image; "
            "save numpy.ascontiguousarray of it"
        )
    return shape, dtype


def _npy_images(path: str, file: IO[bytes]) -> tuple[int, ...]:
    shape, dtype = _npy_header(path, file)
    if dtype != np.uint8:
        raise SourceError(f"{path}: its values are {dtype}; uint8 in 0..255 is read")
    return _image_shape(path, shape)


def _after_header(path: str, file: IO[bytes]) -> IO[bytes]:
    _npy_header(path, file)
    return file


def open_npz(path: str, want: Want) -> Source:
    """Returns the images of an .npz archive: the array `images`, or its only one."""
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name[-4:] == ".npy"]
        columns = [name for name in ("labels", "label", want.group) if name in names]
        others = [name for name in names if name not in columns]
        if "images" not in names and len(others) != 1:
            raise SourceError(
                f"{path}: it holds {', '.join(names) or 'no arrays'}; the array of the images "
                "must be called images"
            )
        images = "images" if "images" in names else others[0]
    with _reading(path), _npz_member(path, images) as file:
        shape = _npy_images(f"{path}, array {images}", file)

    def column(name: str | None) -> Callable[[], list[str]] | None:
        if name is None:
            return None
        if name not in names:
            raise SourceError(f"{path}: it has no array {name!r}; it has {', '.join(names)}")
        _npz_column(path, name, shape[0])
        return lambda: _npz_column(path, name, shape[0])

    label = "label" if "label" in names and "labels" not in names else "labels"
    labels = column(label) if want.labels else None
    groups = column(want.group)
    return _Array(
        path, lambda: _after_header(path, _npz_member(path, images)), shape, labels, groups
    )


def _npz_member(path: str, name: str) -> IO[bytes]:
    with zipfile.ZipFile(path) as archive:
        member = archive.open(name + ".npy")  # holds the file open beyond the archive object
    return io.BufferedReader(cast(io.RawIOBase, member), 1 << 16)


def _npz_column(path: str, name: str, count: int) -> list[str]:
    with _reading(path), _npz_member(path, name) as file:
        shape, dtype = _npy_header(path, file)
        if shape != (count,) or dtype.hasobject or dtype.itemsize > 1024:
            raise SourceError(
                f"{path}: array {name} is {dtype} of shape {shape}; a number or a short text "
                f"for each of the {count} images is read"
            )
        data = file.read(count * dtype.itemsize)
        return [_text(value) for value in np.frombuffer(data, dtype, count).tolist()]


# --- Parquet ----------------------------------------------------------------------------------


def open_parquet(path: str, want: Want) -> Source:
    """Returns the encoded images of a Parquet file."""
    arrow = _arrow()
    with _parquet(arrow, path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
    columns = ", ".join(schema.names)
    label = next((name for name in ("label", "labels") if name in schema.names), None)
    if want.labels and label is None:
        raise SourceError(f"{path}: no column label; it has {columns}")
    if want.group is not None and want.group not in schema.names:
        raise SourceError(f"{path}: no column {want.group!r} to group by; it has {columns}")
    for column in (label if want.labels else None, want.group):
        if column is not None and arrow.types.is_nested(kind := schema.field(column).type):
            raise SourceError(
                f"{path}: column {column} is {kind}; a number or a short text for each row is read"
            )
    if count == 0:
        raise SourceError(f"{path}: it holds no rows")
    image = _image_column(arrow, path, schema)
    return _Parquet(path, count, image, label if want.labels else None, want.group)


@dataclass(frozen=True)
class _Parquet:
    """Encoded images in a column of a Parquet file."""

    name: str
    count: int
    image: str
    label: str | None
    group: str | None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        return self.after(0)

    def after(self, start: int) -> Iterator[Item]:
        arrow = _arrow()
        with _parquet(arrow, self.name) as file:
            names = _class_names(file.schema_arrow, self.label)
            first = 0
            for number in range(file.metadata.num_row_groups):
                end = first + file.metadata.row_group(number).num_rows
                if end > start:
                    yield from self._row_group(arrow, file, names, number, first, end, start)
                first = end

    def _row_group(
        self,
        arrow: Any,
        file: Any,
        names: list[str] | None,
        number: int,
        index: int,
        end: int,
        start: int,
    ) -> Iterator[Item]:
        """The rows of one group from `start` on; where it is damaged each says so."""
        columns = [name for name in (self.image, self.label, self.group) if name is not None]
        batches = file.iter_batches(_ROWS, [number], columns=list(dict.fromkeys(columns)))
        while index < end:
            try:
                batch = next(batches)
                images = _encoded(arrow, batch.column(self.image))
                labels = _texts(batch, self.label, names)
                groups = _texts(batch, self.group, None)
            except (arrow.ArrowException, OSError, StopIteration, ValueError) as damage:
                why = " ".join(str(damage).split()) or "it ends early"
                error = CorruptImage(f"row group {number} of the file is damaged: {why}")
                for row in range(max(index, start), end):
                    yield Item(self.name, row, b"", error=error)
                return
            for image, label, group in zip(images, labels, groups, strict=True):
                if index >= start:
                    why_not = None if image is not None else CorruptImage(_NO_BYTES)
                    yield Item(self.name, index, image or b"", label, group, why_not)
                index += 1


_ROWS = 64  # rows held at a time: of encoded photographs some tens of megabytes
_NO_BYTES = "image has no bytes in its row; embed the image files in the Parquet file"


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "evaluate") from error
    return pyarrow


@contextmanager
def _parquet(arrow: Any, path: str) -> Iterator[Any]:
    with _reading(path), ExitStack() as stack:
        try:
            # A buffered stream without look-ahead: by default whole column chunks are held. From
            # a store they are, since there every read is a request.
            if is_uri(path):
                stored = stack.enter_context(open_store(path).open())
                options = {"source": stored, "pre_buffer": True}
            else:
                options = {"source": path, "buffer_size": 1 << 16, "pre_buffer": False}
            with arrow.parquet.ParquetFile(**options) as file:
                yield file
        except arrow.ArrowException as error:
            raise ValueError(str(error)) from error


def _image_column(arrow: Any, path: str, schema: Any) -> str:
    def holds_bytes(kind: Any) -> bool:
        if arrow.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and holds_bytes(kind.field(index).type)
        return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))

    found: list[str] = [column.name for column in schema if holds_bytes(column.type)]
    for name in ("image", "img"):
        if name in found:
            return name
    if len(found) != 1:
        raise SourceError(
            f"{path}: no column image of bytes, or of a struct with a field bytes; "
            f"it has {', '.join(schema.names)}"
        )
    return found[0]


def _encoded(arrow: Any, column: Any) -> list[bytes | None]:
    if arrow.types.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]
    values: list[bytes | None] = column.to_pylist()
    return values


def _texts(batch: Any, column: str | None, names: list[str] | None) -> Iterable[str | None]:
    if column is None:
        return repeat(None, batch.num_rows)
    values = batch.column(column).to_pylist()
    named = dict(enumerate(names or []))
    return [None if value is None else named.get(value, _text(value)) for value in values]


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """The names that Hugging Face datasets keeps for a ClassLabel column, if any."""
    try:
        info = json.loads(schema.metadata[b"huggingface"])
        names = info["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]
