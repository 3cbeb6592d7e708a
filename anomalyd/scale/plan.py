"""What a run over many machines is to do, kept where its results go.

    OUTPUT/_plan.parquet         the question, and a row for each piece of each part
    OUTPUT/part-000000.parquet   the rows of one part, in the order of the inputs
    OUTPUT/_scored/part-...      with --fdr: parts that wait for the last p-value
    OUTPUT/_manifest.json        counts; written last, so that its being there says "complete"

Whoever reads the folder as a data set sees the parts alone: names with an underscore are passed
over by convention. A part has a name of its own and is written whole or not at all, so that
scoring it twice leaves one, and a run that goes on after a kill has only the missing ones to do.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from anomalyd.detect.bayes import Labelling
from anomalyd.errors import AnomalydError, UsageError
from anomalyd.sources import Piece, Source, cut
from anomalyd.stores import Store

__all__ = [
    "MANIFEST",
    "SCORED",
    "Part",
    "Question",
    "make_plan",
    "part_name",
    "read_plan",
    "read_table",
]

PLAN, MANIFEST, SCORED = "_plan.parquet", "_manifest.json", "_scored"
LEAST, MOST, PARTS = 1_000, 100_000, 10_000
_KEY = b"anomalyd"
_FIELDS = tuple(field.name for field in dataclasses.fields(Piece))


@dataclass(frozen=True)
class Question:
    """Everything that decides what the rows say; a folder holds the answers to one question.

    Attributes:
        bundle: SHA-256 of the bundle's manifest.
        paths: the PATHs as given, lists replaced by their lines.
        folder: the working folder that relative ones count from.
        alpha: rate of false alarms.
        fdr: false discovery rate, or None.
        explain: whether statistics are part of a row.
        labelling: what is asked of labels; None where verdicts have none.
    """

    bundle: str
    paths: list[str]
    folder: str
    alpha: float
    fdr: float | None = None
    explain: bool = False
    labelling: Labelling | None = None


@dataclass(frozen=True)
class Part:
    """Some inputs in a row, and the file that their rows go to."""

    number: int
    pieces: list[Piece]

    @property
    def count(self) -> int:
        """Inputs, as names and headers promise them."""
        return sum(piece.count for piece in self.pieces)


def part_name(number: int) -> str:
    """The file of a part: sorted by name, parts are in the order of the inputs."""
    return f"part-{number:06d}.parquet"


def part_size(images: int) -> int:
    """Images of a part: some thousand parts, and none so small that handing it out costs time."""
    return min(MOST, max(LEAST, -(-images // PARTS)))


def make_plan(store: Store, question: Question, source: Source) -> list[Part]:
    """Cut a source into parts and keep the plan in the output folder, before any is scored.

    Raises:
        AnomalydError: the folder cannot be written.
        UsageError: it holds parts of something else.
    """
    if any(name.startswith("part-") for name in store.list()):
        raise UsageError(
            f"--output {store.uri}: it holds parts, but not their plan; name another folder"
        )
    runs = cut(source, part_size(len(source)))
    parts = [Part(number, pieces) for number, pieces in enumerate(runs)]
    store.write(PLAN, _packed(question, parts))
    return parts


def read_plan(store: Store, question: Question) -> list[Part] | None:
    """The parts that an earlier run of the same question planned; None where there was none.

    Raises:
        UsageError: the folder holds the answers to another question.
        AnomalydError: the plan is damaged.
    """
    import pyarrow as pa

    if PLAN not in store.list():
        return None
    try:
        table = read_table(store.read(PLAN))
        asked = json.loads(table.schema.metadata[_KEY])
        parts = list(_unpacked(table.to_pylist()))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise AnomalydError(
            f"--output {store.uri}: its plan, {PLAN}, is damaged; remove the folder, start again"
        ) from error
    now = json.loads(json.dumps(dataclasses.asdict(question)))
    if other := [name for name in now if asked.get(name) != now[name]]:
        raise UsageError(
            f"--output {store.uri}: it holds scores with another {', '.join(other)}; "
            "name another folder"
        )
    return parts


def read_table(data: bytes, columns: Sequence[str] | None = None) -> Any:
    """A Parquet file that is in memory, as an arrow Table.

    By this thread alone: one of arrow's own may let go of the bytes when the interpreter is gone
    already, and then aborts the process (apache/arrow#33975).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(columns=columns, use_threads=False)


def _packed(question: Question, parts: Iterable[Part]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = [pa.string(), pa.binary(), pa.int64(), pa.int64(), pa.bool_(), pa.string()]
    fields = [("part", pa.int64()), *zip(_FIELDS, types, strict=True)]
    schema = pa.schema(fields, {_KEY: json.dumps(dataclasses.asdict(question)).encode()})
    rows = [
        {"part": part.number, **{name: getattr(piece, name) for name in _FIELDS}}
        for part in parts
        for piece in part.pieces
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="zstd")
    return buffer.getvalue()


def _unpacked(rows: list[dict[str, Any]]) -> Iterator[Part]:
    pieces: dict[int, list[Piece]] = {}
    for row in rows:
        pieces.setdefault(row.pop("part"), []).append(Piece(**row))
    for number in sorted(pieces):
        yield Part(number, pieces[number])
