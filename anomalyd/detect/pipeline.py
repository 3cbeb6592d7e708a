"""The one path from a source to raw scores: calibrate, evaluate, score and embed all take it.

    items -> slabs -> decode (a pool of threads) -> run (the session's) -> the caller, in order

While the caller works on one slab, onnxruntime runs the next and the pool decodes those after it;
at most `AHEAD` slabs exist, so memory does not grow with the source; of photographs that are
scored in tiles each is a slab. How items fall into slabs depends on their number alone: the same
source gives the same bits, every time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from anomalyd.detect import tiling
from anomalyd.detect.runtime import Raw, Session, available_cpus
from anomalyd.errors import ImageError
from anomalyd.images import ImageSpec, Limits, content_hash, to_pixels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.detect.texture import Texture
    from anomalyd.sources import Item

__all__ = ["Collected", "Slab", "collect", "item_name", "maps_of", "none_readable", "scored"]

AHEAD = 4
LARGEST_SLAB = 8  # times the session's batch: hand-overs between threads cost little then
LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class Slab:
    """Consecutive items with what became of them.

    Attributes:
        items: all of them, in order.
        readable: intp (N,): places in `items` of the images that could be read.
        errors: place in `items` -> why that one could not.
        pixels: uint8 (N, H, W, C), as the graph saw them; of tiled images a list, at their own
            sizes.
        hashes: uint64 (N,) content hashes; empty where they were not asked for.
        raw: raw scores of the N images; None where N is 0.
    """

    items: list[Item]
    readable: NDArray[np.intp]
    errors: dict[int, ImageError]
    pixels: NDArray[np.uint8] | list[NDArray[np.uint8]]
    hashes: NDArray[np.uint64]
    raw: Raw | None = None


@dataclass(frozen=True, eq=False)
class Collected:
    """A whole source, scored.

    Attributes:
        raw: raw scores of N images.
        hashes: uint64 (N,) content hashes.
        names: N names, as `item_name` gives them.
        groups: N groups, or None each.
        labels: N class names, or None each.
        errors: (name, error) of what could not be read.
    """

    raw: Raw
    hashes: NDArray[np.uint64]
    names: list[str]
    groups: list[str | None]
    labels: list[str | None]
    errors: list[tuple[str, ImageError]]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: NDArray[np.bool_]) -> Collected:
        kept = np.flatnonzero(rows)
        return Collected(
            self.raw[rows],
            self.hashes[rows],
            [self.names[i] for i in kept],
            [self.groups[i] for i in kept],
            [self.labels[i] for i in kept],
            self.errors,
        )


def item_name(item: Item) -> str:
    """`path`, or `path#index` in a file of many images."""
    return item.source if item.index is None else f"{item.source}#{item.index}"


def none_readable(errors: Sequence[tuple[str, object]]) -> str:
    """What to say of a source where that is all, and of its first image."""
    first = "; the first, {}: {}".format(*errors[0]) if errors else ""
    return f"none of its images can be read{first}"


def maps_of(slab: Slab) -> list[NDArray[np.float32]]:
    """The per-pixel maps of a slab's readable images: float32 (H, W) each, nats.

    Empty where no map was asked for.
    """
    return [] if slab.raw is None or slab.raw.nll_map is None else list(slab.raw.nll_map)


def scored(
    session: Session,
    spec: ImageSpec,
    items: Iterable[Item],
    *,
    texture: Texture | None = None,
    limits: Limits = LIMITS,
    nll_map: bool = False,
    flips: bool = False,
    hashes: bool = False,
    workers: int | None = None,
) -> Iterator[Slab]:
    """Score items in order, overlapping decoding, inference and what the caller does.

    Args:
        session: the bundle's graph.
        spec: the images it takes.
        items: any number; read as they are needed.
        texture: what judges photographs, of a tiled density.
        limits: budgets of one image.
        nll_map: fetch per-pixel maps.
        flips: average them over four flips.
        hashes: compute content hashes.
        workers: decoding threads; None takes what this process may use.

    Raises:
        SourceError: a source that breaks off half way.
        BundleError: a graph that fails.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers or available_cpus(), "decode")
    runner = ThreadPoolExecutor(1, "infer")

    def interrupt(_: int) -> None:
        if stop.is_set():
            raise _Stopped

    def run(decoded: Future[Slab]) -> Slab:
        slab = decoded.result()
        if not len(slab.readable):
            return slab
        raw = tiling.run(
            session,
            spec,
            slab.pixels,
            texture=texture,
            nll_map=nll_map,
            flips=flips,
            progress=interrupt,
        )
        return Slab(slab.items, slab.readable, slab.errors, slab.pixels, slab.hashes, raw)

    try:
        pending: deque[Future[Slab]] = deque()
        # Photographs may be large, and of unlike size: each is a slab of its own.
        for chunk in _chunks(items, 1, 1) if spec.tiled else _chunks(items, session.batch):
            decoded = pool.submit(_decode, chunk, spec, limits, hashes=hashes)
            pending.append(runner.submit(run, decoded))
            if len(pending) == AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        runner.shutdown(wait=True, cancel_futures=True)


def collect(
    session: Session,
    spec: ImageSpec,
    items: Iterable[Item],
    *,
    texture: Texture | None = None,
    progress: Callable[[int], object] | None = None,
    errors: list[tuple[str, ImageError]] | None = None,
) -> Collected | None:
    """Score a whole source and keep its raw scores, hashes and names, never its images.

    Args:
        errors: a list to put (name, error) of what could not be read in, also where that is all.

    Returns:
        None where not one image could be read; see `scored` for the rest.
    """
    names: list[str] = []
    groups: list[str | None] = []
    labels: list[str | None] = []
    errors = [] if errors is None else errors
    raws: list[Raw] = []
    hashes: list[NDArray[np.uint64]] = []
    for slab in scored(session, spec, items, texture=texture, hashes=True):
        errors += [(item_name(slab.items[place]), why) for place, why in slab.errors.items()]
        readable = [slab.items[place] for place in slab.readable]
        names += map(item_name, readable)
        groups += [item.group for item in readable]
        labels += [item.label for item in readable]
        hashes.append(slab.hashes)
        if slab.raw is not None:
            raws.append(slab.raw)
        if progress is not None:
            progress(len(slab.items))
    if not raws:
        return None
    return Collected(Raw.concat(raws), np.concatenate(hashes), names, groups, labels, errors)


class _Stopped(Exception):
    """The caller has gone; nobody waits for this slab."""


def _chunks(
    items: Iterable[Item], batch: int, largest: int = LARGEST_SLAB
) -> Iterator[list[Item]]:
    """Small slabs first, so that the first answers come soon."""
    iterator = iter(items)
    size = batch
    while chunk := list(islice(iterator, size)):
        yield chunk
        size = min(2 * size, largest * batch)


def _decode(items: list[Item], spec: ImageSpec, limits: Limits, *, hashes: bool) -> Slab:
    images: list[NDArray[np.uint8]] = []
    readable: list[int] = []
    errors: dict[int, ImageError] = {}
    for place, item in enumerate(items):
        if item.error is not None:
            errors[place] = item.error
            continue
        try:
            images.append(to_pixels(item.payload, spec, limits))
        except ImageError as error:
            errors[place] = error
            continue
        readable.append(place)
    seen = [content_hash(image) for image in images] if hashes else []
    shape = (-1, spec.height, spec.width, spec.channels)
    pixels = images if spec.tiled else np.array(images, np.uint8).reshape(shape)
    return Slab(items, np.array(readable, np.intp), errors, pixels, np.array(seen, np.uint64))
