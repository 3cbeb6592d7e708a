"""The strangest held-out normals, for a human to look at before the bundle is trusted."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["Strange", "contact_sheet", "write_strangest"]


@dataclass(frozen=True)
class Strange:
    """A held-out normal image.

    Attributes:
        name: where it is.
        p_value: against the other calibration images, in (0, 1].
        bits_per_dim: of the image.
    """

    name: str
    p_value: float
    bits_per_dim: float


def write_strangest(
    folder: Path, strangest: Sequence[Strange], images: Sequence[NDArray[np.uint8]]
) -> tuple[Path, Path]:
    """Write strangest.csv, whose first column `--exclude` reads, and strangest.png."""
    table, sheet = folder / "strangest.csv", folder / "strangest.png"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "p_value", "bits_per_dim"])
        for item in strangest:
            writer.writerow([item.name, f"{item.p_value:.6f}", f"{item.bits_per_dim:.4f}"])
    captions = [f"p={item.p_value:.4f}" for item in strangest]
    contact_sheet(images, captions).save(sheet)
    return table, sheet


def contact_sheet(
    images: Sequence[NDArray[np.uint8]], captions: Sequence[str], *, columns: int = 5
) -> Image.Image:
    """Lay images out in rows with a caption under each.

    Args:
        images: uint8 (H, W, C) each.
        captions: one line an image.
        columns: images a row.
    """
    side, text, gap = 112, 14, 6
    rows = math.ceil(len(images) / columns)
    size = (columns * (side + gap) + gap, rows * (side + text + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        x, y = gap + column * (side + gap), gap + row * (side + text + gap)
        tile = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
        scale = side / max(tile.size)
        shape = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
        filter_ = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
        sheet.paste(tile.resize(shape, filter_), (x, y))
        draw.text((x, y + side), caption, fill="black")
    return sheet
