"""Photographs larger than the model: cut into overlapping tiles, scored, and put together again.

    photograph -> scaled down -> tiles, half a side apart or less -> graph, a few tiles at a time
               -> maps put together -> texture: a score, and where asked for a map of its own size

A photograph is held once, and so is its map where one is asked for; of tiles and what the graph
says of their pixels there are never more than `TILES` times the session's batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from anomalyd.detect import grain
from anomalyd.detect.runtime import Raw, Session
from anomalyd.detect.texture import Field, Texture

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.images import ImageSpec

    Images = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]

__all__ = ["Canvas", "corners", "field", "read", "run", "shrunk", "starts"]

MAPS = ("nll_map", "excess_map")
TILES = 8  # times the session's batch
FLIPS = (np.s_[:, ::-1], np.s_[::-1], np.s_[::-1, ::-1])


def run(
    session: Session,
    spec: ImageSpec,
    images: Images,
    *,
    texture: Texture | None = None,
    nll_map: bool = False,
    flips: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> Raw:
    """Score images as the spec says: whole, or in tiles.

    Args:
        session: the bundle's graph.
        spec: the images it takes.
        images: N from `to_pixels`, N >= 1.
        texture: what judges photographs, where the spec is tiled and the bundle a density.
        nll_map: a map of each image's own size, too: nats a pixel, or of photographs the
            texture's surprise.
        flips: average that map over the image and its three flips, at four times the cost: the
            surprise of a raster scan smears to the right and down, and so it smears evenly.
        progress: called after every run of the graph with the number of images finished by it.

    Raises:
        BundleError: what was asked for is not in the graph, or the graph fails.
    """

    def once(images: Images) -> Raw:
        if spec.tiled:
            return Raw.concat(
                [_photograph(session, spec, image, texture, nll_map, progress) for image in images]
            )
        return session.run(np.asarray(images), nll_map=nll_map, progress=progress)

    raw = once(images)
    if flips and raw.nll_map is not None:
        for flip in FLIPS:
            flipped = once([image[flip] for image in images]).nll_map
            if flipped is not None:
                for whole, part in zip(raw.nll_map, flipped, strict=True):
                    whole += part[flip]
        for whole in raw.nll_map:
            whole /= 1 + len(FLIPS)
    return raw


def starts(side: int, tile: int) -> NDArray[np.intp]:
    """Where tiles begin along a side: from 0, at most half a tile apart, the last one flush.

    Args:
        side: pixels of the image, at least `tile`.
        tile: pixels of a tile.
    """
    gaps = -(-(side - tile) // max(1, tile // 2))
    return np.arange(gaps + 1) * (side - tile) // max(1, gaps)


def corners(height: int, width: int, spec: ImageSpec) -> NDArray[np.intp]:
    """Upper left corners of the tiles of an image, row by row: (T, 2), rows and columns.

    Args:
        height, width: of the image after scaling down.
        spec: of the bundle, tiled.
    """
    rows, columns = starts(height, spec.height), starts(width, spec.width)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=2).reshape(-1, 2)


def shrunk(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """The image scaled down by a whole factor, each pixel the mean of its box, rounded.

    Args:
        image: uint8 (H, W, C); where the factor leaves a rest, the last boxes are narrower.
        factor: 1 gives the image itself.
    """
    if factor == 1:
        return image
    small = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).reduce(factor)
    return np.asarray(small).reshape(small.height, small.width, image.shape[2])


class Canvas:
    """The maps of an image's tiles, averaged where they overlap.

    A tile counts little in its first rows and at its sides, where a pixel that is told by those
    before it knows next to nothing, and from a quarter of the way in fully.

    Args:
        height, width: of the image after scaling down.
        spec: of the bundle, tiled.
    """

    def __init__(self, height: int, width: int, spec: ImageSpec) -> None:
        self._size = spec.height, spec.width
        from_top = _ramp(spec.height)
        from_sides = _ramp(spec.width)
        self._rows, self._columns = from_top, np.minimum(from_sides, from_sides[::-1])
        # Weights are products over rows and columns, and so are their sums over all tiles.
        down = _total(self._rows, starts(height, spec.height), height)
        across = _total(self._columns, starts(width, spec.width), width)
        self._scale = 1 / down, 1 / across
        self._sum = np.zeros((height, width), np.float32)

    def add(self, corners: NDArray[np.intp], maps: NDArray[np.float32]) -> None:
        """Put the maps of some tiles, float32 (n, h, w), where their corners (n, 2) are."""
        height, width = self._size
        weighted = maps * self._rows[:, None] * self._columns
        for (top, left), tile in zip(corners.tolist(), weighted, strict=True):
            self._sum[top : top + height, left : left + width] += tile

    def finished(self) -> NDArray[np.float32]:
        """The map of the image, float32 (height, width), once every tile was added."""
        down, across = self._scale
        finished: NDArray[np.float32] = np.multiply(self._sum, down[:, None])
        finished *= across
        return finished


def read(
    session: Session,
    spec: ImageSpec,
    image: NDArray[np.uint8],
    *,
    maps: Sequence[str] = (),
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[Raw, dict[str, NDArray[np.float32]], NDArray[np.uint8]]:
    """Score the tiles of one photograph.

    Args:
        session: the bundle's graph.
        spec: tiled.
        image: uint8 (H, W, C), from `to_pixels`.
        maps: which per-pixel outputs of the graph to put together.
        progress: called after every run of the graph, with 0.

    Returns:
        Raw scores of one image, means over its tiles; the maps by name, float32 (h, w); and the
        photograph scaled down, uint8 (h, w, C).
    """
    small = shrunk(image, spec.shrink)
    height, width, _ = small.shape
    places = corners(height, width, spec)
    canvases = {name: Canvas(height, width, spec) for name in maps}
    parts = []
    step = TILES * session.batch
    for first in range(0, len(places), step):
        some = places[first : first + step]
        tiles = np.stack(
            [small[y : y + spec.height, x : x + spec.width] for y, x in some.tolist()]
        )
        raw = session.run(
            tiles,
            nll_map="nll_map" in maps,
            excess_map="excess_map" in maps,
            progress=lambda _: progress(0),
        )
        for name, canvas in canvases.items():
            canvas.add(some, getattr(raw, name))
        parts.append(dataclasses.replace(raw, nll_map=None, excess_map=None))
    whole = Raw.concat(parts)
    raw = Raw(
        whole.log_likelihood.mean(axis=0, keepdims=True),
        whole.statistics.mean(axis=0, keepdims=True, dtype=np.float32),
        log_posterior=_mean(whole.log_posterior),
        embedding=_mean(whole.embedding),
        tiles=np.array([len(places)], np.int64),
    )
    return raw, {name: canvas.finished() for name, canvas in canvases.items()}, small


def field(session: Session, spec: ImageSpec, image: NDArray[np.uint8]) -> Field:
    """What a texture is fitted to: one photograph with the maps that the density has of it."""
    _, maps, small = read(session, spec, image, maps=MAPS)
    return _field(spec, image, maps, small)


def _field(
    spec: ImageSpec,
    image: NDArray[np.uint8],
    maps: dict[str, NDArray[np.float32]],
    small: NDArray[np.uint8],
) -> Field:
    # Streaks are thin: the grain is read at twice the density's scale.
    lines = grain.read(shrunk(image, max(1, spec.shrink // 2)))
    grey = small.mean(axis=2, dtype=np.float32)
    return Field(grey, maps["nll_map"], maps["excess_map"], lines)


def _photograph(
    session: Session,
    spec: ImageSpec,
    image: NDArray[np.uint8],
    texture: Texture | None,
    nll_map: bool,
    progress: Callable[[int], object],
) -> Raw:
    """One image's row, its texture score and, where asked for, its map of surprise."""
    names = () if texture is None else MAPS
    raw, maps, small = read(session, spec, image, maps=names, progress=progress)
    progress(1)
    if texture is None:
        return raw
    score, surprise = texture.judge(_field(spec, image, maps, small))
    raw = dataclasses.replace(raw, texture=np.array([score]))
    if not nll_map:
        return raw
    large = surprise.repeat(spec.shrink, axis=0).repeat(spec.shrink, axis=1)
    return dataclasses.replace(raw, nll_map=[large[: image.shape[0], : image.shape[1]]])


def _mean(rows: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    return None if rows is None else rows.mean(axis=0, keepdims=True, dtype=np.float32)


def _ramp(side: int) -> NDArray[np.float32]:
    """Rises from almost nothing to 1 over the first quarter of a side, float32 (side,)."""
    quarter = side // 4 + 1
    return np.minimum(np.arange(1, side + 1, dtype=np.float32) / quarter, 1) ** 2


def _total(
    window: NDArray[np.float32], places: NDArray[np.intp], side: int
) -> NDArray[np.float32]:
    total = np.zeros(side, np.float32)
    for place in places.tolist():
        total[place : place + len(window)] += window
    return total
