"""Photographs larger than the model: cut into overlapping tiles, scored, and put together again.

    photograph -> scaled down -> tiles, half a side apart or less -> graph, a few tiles at a time
                                                                  -> one map, of its own size

A photograph is held once, and so is its map where one is asked for; of tiles and what the graph
says of their pixels there are never more than `TILES` times the session's batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from anomalyd.detect.runtime import Raw, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.images import ImageSpec

    Images = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]

__all__ = ["Canvas", "corners", "image_scores", "per_image", "run", "shrunk", "starts"]

TILES = 8  # times the session's batch
FLIPS = (np.s_[:, ::-1], np.s_[::-1], np.s_[::-1, ::-1])


def run(
    session: Session,
    spec: ImageSpec,
    images: Images,
    *,
    nll_map: bool = False,
    flips: bool = False,
    embedding: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> Raw:
    """Score images as the spec says: whole, or in tiles.

    Args:
        session: the bundle's graph.
        spec: the images it takes.
        images: N from `to_pixels`, N >= 1.
        nll_map: a map of each image's own size, too.
        flips: average that map over the image and its three flips, at four times the cost: the
            surprise of a raster scan smears to the right and down, and so it smears evenly.
        embedding: the encoder's features, too; of tiles their mean.
        progress: called after every run of the graph with the number of images finished by it.

    Raises:
        BundleError: what was asked for is not in the graph, or the graph fails.
    """

    def once(images: Images, *, embedding: bool = False) -> Raw:
        if spec.tiled:
            return Raw.concat(
                [
                    _photograph(session, spec, image, nll_map, embedding, progress)
                    for image in images
                ]
            )
        whole = np.asarray(images)
        return session.run(whole, nll_map=nll_map, embedding=embedding, progress=progress)

    raw = once(images, embedding=embedding)
    if flips and raw.nll_map is not None:
        for flip in FLIPS:
            flipped = once([image[flip] for image in images]).nll_map
            for whole, part in zip(raw.nll_map, flipped or (), strict=True):
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


def per_image(rows: NDArray[np.float64], tiles: NDArray[np.intp] | None) -> NDArray[np.float64]:
    """The mean over each image's tiles, float64 (N,); tiles None: rows as they are."""
    if tiles is None:
        return rows
    means: NDArray[np.float64] = np.add.reduceat(rows, np.cumsum(tiles) - tiles) / tiles
    return means


def image_scores(
    rows: NDArray[np.float64], tiles: NDArray[np.intp] | None, fit: NDArray[np.float64]
) -> NDArray[np.float64]:
    """One score an image from the scores of its tiles: log of the mean over tiles of 1 / p.

    p is a tile's tail among the fit split's tiles, 1 - F(score). Among many tiles an extreme one
    is no surprise: of T independent normal tiles the score behaves the same for every T, for the
    mean of 1 / p is the reciprocal of their harmonic mean p-value. Beyond the ranks, the tail goes
    on as an exponential one.

    Args:
        rows: float64 (R,), scores of tiles, higher is stranger.
        tiles: intp (N,), how many rows each image has; None: rows are scores of images already.
        fit: float64 (m,), scores of the fit split's tiles, ascending.

    References:
        The harmonic mean p-value for combining dependent tests (Wilson, 2019).
    """
    if tiles is None:
        return rows
    surprise = _surprise(rows, fit)
    first = np.cumsum(tiles) - tiles
    most = np.maximum.reduceat(surprise, first)
    shifted = np.exp(surprise - np.repeat(most, tiles))
    return most + np.log(np.add.reduceat(shifted, first) / tiles)


def _surprise(scores: NDArray[np.float64], fit: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log(1 - F(score)), by ranks among `fit` and from its last `k` on by their mean excess."""
    m = len(fit)
    k = max(1, round(m**0.5))
    at = fit[-k]
    scale = float(np.mean(fit[-k:] - at)) or 1.0
    below = np.searchsorted(fit, scores, side="left")
    ranked = -np.log((m - np.minimum(below, m - k)) / m)
    surprise: NDArray[np.float64] = ranked + np.maximum(scores - at, 0) / scale
    return surprise


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
        self._sum *= down[:, None]
        self._sum *= across
        return self._sum


def _photograph(
    session: Session,
    spec: ImageSpec,
    image: NDArray[np.uint8],
    nll_map: bool,
    embedding: bool,
    progress: Callable[[int], object],
) -> Raw:
    small = shrunk(image, spec.shrink)
    height, width, _ = small.shape
    places = corners(height, width, spec)
    canvas = Canvas(height, width, spec) if nll_map else None
    parts = []
    step = TILES * session.batch
    for first in range(0, len(places), step):
        some = places[first : first + step]
        tiles = np.stack(
            [small[y : y + spec.height, x : x + spec.width] for y, x in some.tolist()]
        )
        raw = session.run(
            tiles, nll_map=nll_map, embedding=embedding, progress=lambda _: progress(0)
        )
        if canvas is not None and raw.nll_map is not None:
            canvas.add(some, np.asarray(raw.nll_map))
        parts.append(raw.with_maps(None))
    progress(1)
    whole = Raw.concat(parts)
    maps = None
    if canvas is not None:
        factor = spec.shrink
        large = canvas.finished()
        if factor > 1:
            large = large.repeat(factor, axis=0).repeat(factor, axis=1)
        maps = [large[: image.shape[0], : image.shape[1]]]
    return Raw(
        whole.log_likelihood,
        whole.statistics,
        maps,
        _mean(whole.log_posterior),
        _mean(whole.embedding),
        tiles=np.array([len(places)]),
    )


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
