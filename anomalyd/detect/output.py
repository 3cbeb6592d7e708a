"""Where rows go: a table, JSON lines, CSV or Parquet; to a stream or to a file.

A file appears whole or not at all. Rows of verdicts first go to a journal, NAME.part, one line of
JSON each under a line that says what was asked for; the file is made from it at the end, under a
temporary name, and renamed. So whenever the process dies, either the old file is there untouched,
or the new one is, and the journal is what `--resume` goes on from.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import click
import msgspec
import numpy as np

from anomalyd.errors import AnomalydError, MissingExtra, UsageError, printable

__all__ = [
    "FORMATS",
    "Journal",
    "Row",
    "Writer",
    "check_place",
    "columns",
    "file_format",
    "make_writer",
    "whole",
    "write_file",
]

Row = dict[str, Any]
"""One input: its verdict or its embedding, or `source`, `index` and `error`."""

FORMATS = ("table", "jsonl", "csv")
FILES = {".parquet": "parquet", ".jsonl": "jsonl", ".csv": "csv"}
VERDICT = ("bits_per_dim", "likelihood", "score", "score_name", "p_value", "alpha", "outlier")
LABELS = ("label", "posterior", "rejected", "reason")
TEXTS = ("source", "label", "likelihood", "score_name", "posterior", "reason", "explain", "error")
ROWS_AT_A_TIME = 4096

_encoder = msgspec.json.Encoder(enc_hook=np.ndarray.tolist)


class Writer(Protocol):
    """Writes rows in one format; `close` writes what has to come last."""

    def write(self, rows: Sequence[Row]) -> None: ...
    def close(self) -> None: ...


def columns(*, fdr: bool = False, labels: bool = False, explain: bool = False) -> tuple[str, ...]:
    """The columns of a table of rows, in order."""
    optional = [("q_value",) if fdr else (), LABELS if labels else ()]
    optional.append(("explain",) if explain else ())
    return ("source", "index", *VERDICT, *(name for part in optional for name in part), "error")


def file_format(path: Path) -> str:
    """The format that a file's name asks for.

    Raises:
        UsageError: an extension that is none of .parquet, .jsonl and .csv, or a folder there.
        MissingExtra: Parquet without pyarrow, told before anything is scored.
    """
    kind = FILES.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"--output {path}: the name must end in {', '.join(FILES)}")
    if path.is_dir():
        raise UsageError(f"--output {path}: a folder is there; name a file")
    if kind == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise MissingExtra("pyarrow", "evaluate") from None
    return kind


def make_writer(
    kind: str, stream: IO[bytes], names: Sequence[str], *, features: int = 0
) -> Writer:
    """The writer of one format.

    Args:
        kind: "parquet", "csv", "jsonl" or "table".
        stream: what to write to.
        names: the columns, which JSON lines do not need.
        features: numbers in the column `embedding`, where there is one.
    """
    if kind == "parquet":
        return _Parquet(stream, names, features)
    if kind == "csv":
        return _Csv(stream, names, features)
    return _Table(stream) if kind == "table" else _JsonLines(stream)


def write_file(
    path: Path, kind: str, names: Sequence[str], rows: Iterable[Row], *, features: int = 0
) -> None:
    """A file of rows, streamed, that is there whole once they have ended well, or not at all.

    Args:
        path: the file to be.
        kind: "parquet", "csv" or "jsonl".
        names: the columns.
        rows: any number.
        features: as for `make_writer`.

    Raises:
        AnomalydError: the disk refuses.
    """
    with whole("--output", path) as new, new.open("wb") as stream:
        writer = make_writer(kind, stream, names, features=features)
        iterator = iter(rows)
        while chunk := list(islice(iterator, ROWS_AT_A_TIME)):
            writer.write(chunk)
        writer.close()
        stream.flush()
        os.fsync(stream.fileno())


def check_place(option: str, path: Path) -> None:
    """See that a file can be written there, before anything is done for it.

    Args:
        option: what messages begin with, such as --output.
        path: the file to be.

    Raises:
        UsageError: a folder is there.
        AnomalydError: there is no folder to put it in, or one that cannot be written to.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise AnomalydError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise UsageError(f"{option} {path}: a folder is there; name a file")
    if not os.access(folder, os.W_OK):
        raise AnomalydError(f"{option} {path}: its folder cannot be written to; name another")


@contextmanager
def whole(option: str, path: Path) -> Iterator[Path]:
    """Name a file to write, which takes the place of `path` at the end, or goes if that fails.

    Raises:
        AnomalydError: the disk refuses.
    """
    new = path.with_name(path.name + ".new")
    with _writing(path, option):
        try:
            yield new
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


class Journal:
    """The rows of a file to be, kept safe while they come in.

    Args:
        path: the file to be; the journal is `path` + ".part".
        header: everything that decides what a row says; a journal of another header is no
            beginning of this one.
        resume: go on from the journal that is there, if any.

    Raises:
        UsageError: a journal that was begun with another header.
        AnomalydError: the disk refuses.
    """

    def __init__(self, path: Path, header: Row, *, resume: bool = False) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.count = 0
        self.last: Row | None = None
        with _writing(path):
            if resume and self.part.exists():
                self._file: IO[bytes] = self.part.open("r+b")
                self._read_on(header)
            else:
                self._file = self.part.open("w+b")
                self._file.write(_encoder.encode(header) + b"\n")
                self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows; they outlive the process from here on."""
        with _writing(self.path):
            self._file.write(_encoder.encode_lines(rows))
            self._file.flush()
        self.count += len(rows)

    def rows(self) -> Iterator[Row]:
        """All rows from the first."""
        self._file.seek(0)
        self._file.readline()
        for line in self._file:
            yield msgspec.json.decode(line)

    def finish(self, kind: str, names: Sequence[str], rows: Iterable[Row]) -> None:
        """Make the file from rows, put it in place and remove the journal."""
        write_file(self.path, kind, names, rows)
        with _writing(self.path):
            self.part.unlink()

    def _read_on(self, header: Row) -> None:
        """Count the whole rows that are there and cut off the half one that a kill may leave."""
        first = self._file.readline()
        if first != _encoder.encode(header) + b"\n":
            self._file.close()
            raise UsageError(
                f"--resume: {self.part} was begun with another bundle, alpha or other options; "
                "repeat those, or start again without --resume"
            )
        end = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            self.count += 1
            last = line
        if self.count:
            self.last = msgspec.json.decode(last)
        self._file.seek(end)
        self._file.truncate()


class _JsonLines:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, rows: Sequence[Row]) -> None:
        self._stream.write(_encoder.encode_lines(rows))

    def close(self) -> None:
        pass


class _Lines(io.StringIO):
    """Rows that end in a newline; a carriage return is quoted only by who ends rows in one."""

    END = "\r\n"

    def write(self, row: str) -> int:
        return super().write(row.removesuffix(self.END) + "\n")


class _Csv:
    """An embedding is spread over columns of its own: embedding_0, embedding_1 and so on."""

    def __init__(self, stream: IO[bytes], names: Sequence[str], features: int) -> None:
        self._stream = stream
        self._spread = [f"embedding_{i}" for i in range(features)]
        spread = {"embedding": self._spread}
        names = [part for name in names for part in spread.get(name, [name])]
        self._buffer = _Lines()
        self._writer = csv.DictWriter(self._buffer, names, lineterminator=_Lines.END)
        self._writer.writeheader()

    def write(self, rows: Sequence[Row]) -> None:
        self._writer.writerows(self._columns(_flat(row)) for row in rows)
        self._flush()

    def _columns(self, row: Row) -> Row:
        vector = row.get("embedding")
        if vector is None:
            return row
        rest = {name: value for name, value in row.items() if name != "embedding"}
        return rest | dict(zip(self._spread, vector.tolist(), strict=True))

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        self._stream.write(self._buffer.getvalue().encode())
        self._buffer.seek(0)
        self._buffer.truncate()


class _Parquet:
    """Typed columns, null where a row has no such field."""

    def __init__(self, stream: IO[bytes], names: Sequence[str], features: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {name: pa.string() for name in TEXTS}
        types |= {"index": pa.int64(), "outlier": pa.bool_(), "rejected": pa.bool_()}
        if features:
            types["embedding"] = pa.list_(pa.float32(), features)
        self._table = pa.Table
        self._schema = pa.schema([(name, types.get(name, pa.float64())) for name in names])
        self._writer = pq.ParquetWriter(stream, self._schema)

    def write(self, rows: Sequence[Row]) -> None:
        flat = [_flat(row) for row in rows]
        self._writer.write_table(self._table.from_pylist(flat, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


class _Table:
    """Columns of fixed width, so that a million rows stream as well as ten."""

    WIDTH = 12
    HEAD = f"{'p-value':>10}  {'verdict':<{WIDTH}}{'score':>10}  {'bits/dim':>9}  image\n"

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._colour = stream.isatty()
        self._stream.write(self.HEAD.encode())

    def write(self, rows: Sequence[Row]) -> None:
        self._stream.write("".join(map(self._line, rows)).encode())

    def close(self) -> None:
        pass

    def _line(self, row: Row) -> str:
        index = row["index"]
        name = printable(row["source"] if index is None else f"{row['source']}#{index}")
        if "error" in row:
            verdict = self._style(f"{'unreadable':<{self.WIDTH}}", "yellow")
            return f"{'-':>10}  {verdict}{'-':>10}  {'-':>9}  {name}: {printable(row['error'])}\n"
        said = "OUTLIER" if row["outlier"] else row.get("label") or row.get("reason") or "normal"
        verdict = f"{said[: self.WIDTH - 1]:<{self.WIDTH}}"
        if row["outlier"]:
            verdict = self._style(verdict, "red")
        numbers = f"{row['score']:>10.5g}  {row['bits_per_dim']:>9.4g}"
        explained = "".join(
            f"{'':>12}{key} {entry['value']:.5g}, p {entry['p_value']:.3g}\n"
            for key, entry in row.get("explain", {}).items()
        )
        return f"{row['p_value']:>10.5f}  {verdict}{numbers}  {name}\n{explained}"

    def _style(self, text: str, colour: str) -> str:
        return click.style(text, fg=colour, bold=True) if self._colour else text


def _flat(row: Row) -> Row:
    """What has as many keys as the bundle has statistics or classes, as text."""
    nested = {name: row[name] for name in ("explain", "posterior") if name in row}
    return row | {name: _encoder.encode(value).decode() for name, value in nested.items()}


@contextmanager
def _writing(path: Path, option: str = "--output") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AnomalydError(f"{option} {path}: cannot be written: {error.strerror}") from error
