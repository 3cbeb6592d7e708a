"""Per-pixel maps as pictures: where in the image the surprise sits."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["beside_png", "heatmap_png"]

SMALLEST_SIDE = 224  # a thumbnail's map is enlarged by whole numbers until it can be looked at
BAND = 256  # rows
OPAQUE = 0.8  # of the brightest place of an overlay
STOPS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])


def heatmap_png(pixels: NDArray[np.uint8], nll_map: NDArray[np.float32]) -> bytes:
    """The image with its map as a PNG; bright is surprising.

    Beside a thumbnail stands its map, `beside_png`; from 224 pixels on, the map lies over the
    image, and the picture has the image's own size. The colours run from the map's own 50th
    percentile to its largest value, so they compare pixels within an image and not images with
    one another; p-values do that.

    Args:
        pixels: uint8 (H, W, C), C 1 or 3.
        nll_map: float32 (H, W), nats per pixel; non-finite values count as the largest.

    Returns:
        bytes of an RGB PNG, W x H, or 2 W x H times the enlargement.
    """
    if max(pixels.shape[:2]) < SMALLEST_SIDE:
        return beside_png(pixels, nll_map)
    grey, level = _rgb(pixels), _levels(nll_map)
    picture = np.empty(grey.shape, np.uint8)
    for top in range(0, len(picture), BAND):  # a large photograph as floats is a large matter
        rows = np.s_[top : top + BAND]
        opacity = (OPAQUE * level[rows])[..., None]
        picture[rows] = (grey[rows] * (1 - opacity) + _colours(level[rows]) * opacity).round()
    return _png(picture)


def beside_png(pixels: NDArray[np.uint8], nll_map: NDArray[np.float32]) -> bytes:
    """The image, enlarged until it can be looked at, and right of it its map; as `heatmap_png`."""
    pair = np.concatenate([_rgb(pixels), _colours(_levels(nll_map))], axis=1)
    times = max(1, -(-SMALLEST_SIDE // max(pixels.shape[:2])))
    return _png(pair.repeat(times, axis=0).repeat(times, axis=1))


def _rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels[..., :1].repeat(3, axis=2) if pixels.shape[2] == 1 else pixels


def _png(picture: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, "PNG")
    return stream.getvalue()


def _levels(nll_map: NDArray[np.float32]) -> NDArray[np.float32]:
    """The map from 0, its median, to 1, its largest value."""
    known = nll_map[np.isfinite(nll_map)]
    low, high = (float(np.median(known)), float(known.max())) if known.size else (0.0, 0.0)
    level = np.where(np.isfinite(nll_map), nll_map, np.float32(high))
    level -= np.float32(low)
    level /= np.float32((high - low) or 1.0)
    return np.clip(level, 0, 1, out=level)


def _colours(level: NDArray[np.float32]) -> NDArray[np.uint8]:
    channels = [np.interp(level, STOPS, COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=2).round().astype(np.uint8)
