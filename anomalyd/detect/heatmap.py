"""Per-pixel maps as pictures: where in the image the surprise sits."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["heatmap_png"]

SMALLEST_SIDE = 224  # a thumbnail's map is enlarged by whole numbers until it can be looked at
STOPS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])


def heatmap_png(pixels: NDArray[np.uint8], nll_map: NDArray[np.float32]) -> bytes:
    """The image and, right of it, its map as a PNG; bright is surprising.

    The colours run from the map's own 50th percentile to its largest value, so they compare
    pixels within an image and not images with one another; p-values do that.

    Args:
        pixels: uint8 (H, W, C), C 1 or 3.
        nll_map: float32 (H, W), nats per pixel; non-finite values count as the largest.

    Returns:
        bytes of an RGB PNG, 2 W x H times the enlargement.
    """
    grey = pixels[..., :1].repeat(3, axis=2) if pixels.shape[2] == 1 else pixels
    pair = np.concatenate([grey, _colours(nll_map)], axis=1)
    times = max(1, -(-SMALLEST_SIDE // max(pixels.shape[:2])))
    pair = pair.repeat(times, axis=0).repeat(times, axis=1)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pair)).save(stream, "PNG")
    return stream.getvalue()


def _colours(nll_map: NDArray[np.float32]) -> NDArray[np.uint8]:
    values = nll_map.astype(np.float64)
    known = values[np.isfinite(values)]
    low, high = (float(np.median(known)), float(known.max())) if known.size else (0.0, 0.0)
    values = np.where(np.isfinite(values), values, high)
    level = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
    channels = [np.interp(level, STOPS, COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=2).round().astype(np.uint8)
