"""Batch scoring on Ray Data: the local engine's rows, from as many actors as there are CPUs.

    plan -> Ray Data hands out parts -> actor: read, decode, score, write the part -> its counts
                                          |
                                          `-> with --fdr: one histogram of all p-values, and
                                              Ray Data hands the parts out again to be decided

An actor holds one onnxruntime session and streams the images of a part through the pipeline that
the local engine has, so images never travel between processes; what Ray carries is names there
and counts back. Ray gives an actor its next part when it is about to be done with one, and a part
whose node has died to another actor.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalyd.detect import conformal
from anomalyd.detect.bayes import AMBIGUOUS, NOVEL
from anomalyd.detect.bundle import MANIFEST as BUNDLE_MANIFEST
from anomalyd.detect.detector import Detector
from anomalyd.detect.output import Row, make_writer
from anomalyd.detect.score import Scoring, Summary, score_rows
from anomalyd.errors import AnomalydError, UsageError
from anomalyd.scale.cluster import reason
from anomalyd.scale.plan import MANIFEST, SCORED, Part, Question, part_name, read_table
from anomalyd.sources import open_pieces
from anomalyd.stores import Store

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

__all__ = ["Tally", "bundle_files", "finished", "score"]


@dataclass
class Tally:
    """Counts over the rows of one part, or of all.

    Attributes:
        images, outliers, ambiguous, unreadable, unfamiliar: as in `Summary`.
        ranks: rank -> how many p-values have it; kept with --fdr alone.
        began, ended: seconds since the epoch, of the first part scored and of the last.
    """

    images: int = 0
    outliers: int = 0
    ambiguous: int = 0
    unreadable: int = 0
    unfamiliar: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    began: float = math.inf
    ended: float = -math.inf

    @property
    def seconds(self) -> float:
        """From the first image to the last, the start of Ray and its actors left out."""
        return max(0.0, self.ended - self.began)

    def add(self, other: Tally) -> None:
        """Add the counts of another part."""
        self.images += other.images
        self.outliers += other.outliers
        self.ambiguous += other.ambiguous
        self.unreadable += other.unreadable
        self.unfamiliar += other.unfamiliar
        self.began = min(self.began, other.began)
        self.ended = max(self.ended, other.ended)
        for rank, count in other.ranks.items():
            self.ranks[rank] = self.ranks.get(rank, 0) + count


def bundle_files(detector: Detector) -> dict[str, bytes]:
    """The bundle as bytes: it travels with the job, so no node needs to have it."""
    names = detector.manifest.files
    return {
        BUNDLE_MANIFEST: (detector.path / BUNDLE_MANIFEST).read_bytes(),
        **{name: detector.bundle.read(name) for name in names},
    }


def score(
    ray: ModuleType,
    detector: Detector,
    question: Question,
    parts: Sequence[Part],
    store: Store,
    *,
    device: str = "auto",
    progress: Callable[[int], object] = lambda _: None,
) -> Tally:
    """Score what is missing of a plan, and write the manifest that says the folder is complete.

    Args:
        ray: connected.
        detector: the bundle.
        question: what is asked of every image.
        parts: the plan.
        store: the output folder.
        device: "auto" takes GPUs where the cluster has any, "cpu", or "cuda".
        progress: called with the number of images done.

    Raises:
        UsageError: "cuda" on a cluster without GPUs.
        AnomalydError: what went wrong on a node, or with the output.
    """
    there = set(store.list())
    scored = f"{SCORED}/" if question.fdr is not None else ""
    work = _Work(question, detector.manifest.name, store, scored)
    orders = [
        # Of a part that is there only the counts are wanted.
        _Order(part, bool({scored + part_name(part.number), part_name(part.number)} & there))
        for part in parts
    ]
    total = Tally()
    told = {"files": ray.put(bundle_files(detector)), "work": work}
    for tally in _handed_out(ray, orders, _Scorer, told, device):
        total.add(tally)
        progress(tally.images)
    if question.fdr is not None:
        # Also what was decided before, where its file was damaged and it was scored again.
        there = set(store.list())
        left = [_Order(part) for part in parts if scored + part_name(part.number) in there]
        total.outliers, total.ambiguous = _decide(ray, work, total, detector, left)
    rows = {
        "format_version": 1,
        "bundle": {"name": detector.manifest.name, "version": detector.manifest.version},
        "question": asdict(question),
        "parts": len(parts),
        "images": total.images,
        "outliers": total.outliers,
        "ambiguous": total.ambiguous,
        "unreadable": total.unreadable,
        "seconds": round(total.seconds, 3),
    }
    store.write(MANIFEST, json.dumps(rows, indent=2).encode() + b"\n")
    if scored:
        store.delete(f"{scored}{part_name(part.number)}" for part in parts)
    return total


def finished(store: Store) -> Tally | None:
    """The counts of a folder that is complete; None of one that is not."""
    if MANIFEST not in store.list():
        return None
    try:
        said = json.loads(store.read(MANIFEST))
        return Tally(*(said[name] for name in ("images", "outliers", "ambiguous", "unreadable")))
    except (ValueError, KeyError, TypeError):
        return None  # half written by something else: it will be written again


@dataclass(frozen=True)
class _Order:
    """A part, and whether its file is there already."""

    part: Part
    there: bool = False


@dataclass(frozen=True)
class _Answer:
    """What came of an order: counts, or what went wrong."""

    number: int
    tally: Tally
    error: str = ""


@dataclass(frozen=True)
class _Work:
    """What every actor is told."""

    question: Question
    name: str
    store: Store
    folder: str  # below the output, where scored parts go

    @property
    def scoring(self) -> Scoring:
        asked = self.question
        return Scoring(asked.alpha, asked.labelling, asked.fdr, asked.explain)


class _Actor:
    """What Ray Data calls: one order after the other."""

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        return {"item": [self._told(order) for order in batch["item"]]}

    def _told(self, order: _Order) -> _Answer:
        try:
            return _Answer(order.part.number, self._answer(order))
        except AnomalydError as error:
            return _Answer(order.part.number, Tally(), str(error))

    def _answer(self, order: _Order) -> Tally:
        raise NotImplementedError


class _Scorer(_Actor):
    """One session; writes the rows of parts."""

    def __init__(self, files: Any, work: _Work) -> None:
        import ray

        self._work, self._failed = work, ""
        context = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        self._threads = max(1, int(context.get("CPU", 1)))
        # Not there on another machine: absolute paths and URIs are what can be read then.
        with suppress(OSError):
            os.chdir(work.question.folder)
        try:
            with tempfile.TemporaryDirectory(prefix="anomalyd-") as folder:
                path = Path(folder) / work.name
                path.mkdir()
                for name, data in ray.get(files).items():
                    (path / name).write_bytes(data)
                device = "cuda" if context.get("GPU") else "cpu"
                self._detector = Detector.load(path, device=device, threads=self._threads)
        except (AnomalydError, OSError) as error:
            # Raised here, it would be tried again on every node; told with a part, it is read.
            self._failed = " ".join(str(error).split())

    def _answer(self, order: _Order) -> Tally:
        if self._failed:
            raise AnomalydError(self._failed)
        name = self._work.folder + part_name(order.part.number)
        if order.there and (known := _counts(self._work, name, self._levels)) is not None:
            return known
        scoring, summary, tally = self._work.scoring, Summary(), Tally(began=time.time())
        buffer = io.BytesIO()
        writer = make_writer("parquet", buffer, scoring.columns)
        for rows in score_rows(
            self._detector,
            open_pieces(order.part.pieces),
            scoring,
            summary,
            workers=self._threads,
        ):
            summary.add(rows)
            writer.write(rows)
            self._count(tally, rows)
        writer.close()
        self._work.store.write(name, buffer.getvalue())
        tally.ended = time.time()
        tally.images, tally.outliers = summary.images, summary.outliers
        tally.ambiguous, tally.unreadable = summary.ambiguous, summary.unreadable
        tally.unfamiliar = summary.unfamiliar
        return tally

    def _count(self, tally: Tally, rows: list[Row]) -> None:
        if self._work.question.fdr is not None:
            p_values = [row["p_value"] for row in rows if "error" not in row]
            _add_ranks(tally, p_values, self._levels)

    @property
    def _levels(self) -> NDArray[np.float64]:
        return self._detector.calibration.levels


def _add_ranks(tally: Tally, p_values: Any, levels: NDArray[np.float64]) -> None:
    ranks, counts = np.unique(conformal.ranks(p_values, levels), return_counts=True)
    for rank, count in zip(ranks.tolist(), counts.tolist(), strict=True):
        tally.ranks[rank] = tally.ranks.get(rank, 0) + count


def _counts(work: _Work, name: str, levels: NDArray[np.float64]) -> Tally | None:
    """The counts of a part that was written before; None where it is not whole."""
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = ["reason"] if work.question.labelling is not None else []
    try:
        try:
            data = work.store.read(name)
        except AnomalydError:
            data = work.store.read(name.removeprefix(work.folder))  # decided already
        found = read_table(data, ["outlier", "p_value", "error", *labels])
    except (AnomalydError, pa.ArrowException, OSError, KeyError):
        return None
    tally = Tally(
        images=len(found),
        outliers=pc.sum(found["outlier"]).as_py() or 0,
        ambiguous=_ambiguous(found),
        unreadable=len(found) - found["error"].null_count,
    )
    if work.question.fdr is not None:
        _add_ranks(tally, np.asarray(found["p_value"].drop_null()), levels)
    return tally


def _ambiguous(table: Any) -> int:
    """How many rows fit several classes; none of a bundle without classes."""
    import pyarrow.compute as pc

    if "reason" not in table.column_names:
        return 0
    return pc.sum(pc.equal(table["reason"], AMBIGUOUS)).as_py() or 0


def _decide(
    ray: ModuleType, work: _Work, total: Tally, detector: Detector, orders: Sequence[_Order]
) -> tuple[int, int]:
    """Flag by Benjamini-Hochberg over all parts, each written again.

    Returns:
        Outliers and ambiguous ones, as in `Summary`.
    """
    levels = detector.calibration.levels
    counts = np.zeros(len(levels), np.int64)
    for rank, count in total.ranks.items():
        counts[rank] = count
    q_table = conformal.q_table(counts, levels)
    told = {"work": work, "levels": levels, "q_table": q_table}
    decided = _handed_out(ray, orders, _Decider, told, "cpu")
    ambiguous = sum(tally.ambiguous for tally in decided)
    return int(counts[q_table <= (work.question.fdr or 0)].sum()), ambiguous


class _Decider(_Actor):
    """Puts q-values into parts that are scored, and what follows from them."""

    def __init__(
        self, work: _Work, levels: NDArray[np.float64], q_table: NDArray[np.float64]
    ) -> None:
        self._work, self._levels, self._q_table = work, levels, q_table

    def _answer(self, order: _Order) -> Tally:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        work, name = self._work, part_name(order.part.number)
        table = read_table(work.store.read(work.folder + name))
        p_values = table["p_value"].to_numpy()
        readable = ~np.isnan(p_values)
        q_values = np.full(len(p_values), np.nan)
        q_values[readable] = self._q_table[conformal.ranks(p_values[readable], self._levels)]
        fdr = work.question.fdr or 0.0
        with np.errstate(invalid="ignore"):
            outlier = pa.array(q_values <= fdr, mask=~readable)
        decided = {"outlier": outlier, "q_value": pa.array(q_values, mask=~readable)}
        if work.question.labelling is not None:
            novel = {"label": pa.scalar(None, pa.string()), "rejected": True, "reason": NOVEL}
            decided |= {
                key: pc.if_else(outlier, value, table[key]) for key, value in novel.items()
            }
        for key, column in decided.items():
            table = table.set_column(table.schema.get_field_index(key), key, column)
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        work.store.write(name, buffer.getvalue())
        return Tally(ambiguous=_ambiguous(table))


def _handed_out(
    ray: ModuleType,
    orders: Sequence[_Order],
    actor: type[_Actor],
    told: dict[str, Any],
    device: str,
) -> Iterator[Tally]:
    """The tallies of parts, as actors finish them; each part once."""
    if not orders:
        return
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if device == "cuda" and not gpus:
        raise UsageError("device cuda: the Ray cluster has no GPU; use --device cpu")
    each: dict[str, Any] = {"num_cpus": 1}
    actors = cpus
    if gpus and device != "cpu":
        each, actors = {"num_gpus": 1, "num_cpus": max(1, cpus // gpus)}, gpus
    actors = max(1, min(actors, len(orders)))
    data = ray.data.from_items(list(orders), override_num_blocks=len(orders)).map_batches(
        actor,
        batch_size=None,
        # Two parts at an actor, so that it never waits. The pool may shrink at the end: what a
        # dead node was given waits for a CPU that another actor has to leave.
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=actors, initial_size=actors, max_tasks_in_flight_per_actor=2
        ),
        fn_constructor_kwargs=told,
        **each,
    )
    seen: set[int] = set()
    try:
        for row in data.iter_rows():
            answer: _Answer = row["item"]
            if answer.error:
                raise AnomalydError(answer.error)
            if answer.number not in seen:
                seen.add(answer.number)
                yield answer.tally
    except ray.exceptions.RayError as error:
        raise AnomalydError(
            f"Ray: {reason(error)}; what is scored is kept: run the same command again"
        ) from None
    if missing := len(orders) - len(seen):
        raise AnomalydError(f"Ray lost {missing} of {len(orders)} parts; run the command again")
