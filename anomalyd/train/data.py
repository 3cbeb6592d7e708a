"""Training images, decoded once by the serving path into one memory-mapped array."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anomalyd.detect.pipeline import item_name
from anomalyd.errors import ImageError, TrainingError, UsageError
from anomalyd.images import ImageSpec, content_hash, to_pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from anomalyd.sources import Item, Source

__all__ = ["TrainingData", "excluded", "gather", "reopen"]


@dataclass(frozen=True)
class TrainingData:
    """Decoded images and what is known of each.

    Attributes:
        pixels: uint8 (N, H, W, C), memory-mapped.
        hashes: uint64 (N,) content hashes.
        names: N sources, `path` or `path#index`.
        groups: N group names or None.
        labels: N class names or None.
        unreadable: `name: reason` of what was left out.
    """

    pixels: NDArray[np.uint8]
    hashes: NDArray[np.uint64]
    names: list[str]
    groups: list[str | None]
    labels: list[str | None]
    unreadable: list[str]

    @property
    def digest(self) -> str:
        """SHA-256 over the content hashes in order: which data a bundle was made from."""
        return hashlib.sha256(self.hashes.astype("<u8").tobytes()).hexdigest()


def excluded(path: Path | None) -> frozenset[str]:
    """Read an `--exclude` file: one name a line; the first column of a CSV counts.

    Raises:
        UsageError: the file cannot be read.
    """
    if path is None:
        return frozenset()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--exclude {path} cannot be read: {error}") from error
    return frozenset(line.split(",")[0].strip() for line in lines if line.strip())


def gather(
    source: Source,
    spec: ImageSpec,
    folder: Path,
    *,
    exclude: frozenset[str] = frozenset(),
    advance: Callable[[int], None] = lambda _: None,
) -> TrainingData:
    """Decode `source` into `folder`/pixels.npy, one row an image, reading nothing twice.

    Args:
        source: images in order.
        spec: the shape and size policy that the bundle will have.
        folder: an existing folder for the array.
        exclude: names to leave out.
        advance: called with the number of images done, for a progress bar.

    Raises:
        TrainingError: no readable image at all.
    """
    path = folder / "pixels.npy"
    shape = (len(source), spec.height, spec.width, spec.channels)
    if not shape[0]:
        raise TrainingError(f"{source.name} holds no images")
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    hashes: list[int] = []
    names: list[str] = []
    groups: list[str | None] = []
    labels: list[str | None] = []
    unreadable: list[str] = []
    kept = (item for item in source if item_name(item) not in exclude)
    for item, pixels in _decoded(kept, spec):
        name = item_name(item)
        if isinstance(pixels, ImageError):
            unreadable.append(f"{name}: {pixels}")
        else:
            rows[len(names)] = pixels
            hashes.append(content_hash(pixels))
            names.append(name)
            groups.append(item.group)
            labels.append(item.label)
        advance(1)
    if not names:
        raise TrainingError(
            f"no image of {source.name} could be used; the first says: {unreadable[0]}"
            if unreadable
            else f"--exclude leaves no image of {source.name}"
        )
    rows.flush()
    known = {
        "hashes": hashes,
        "names": names,
        "groups": groups,
        "labels": labels,
        "unreadable": unreadable,
    }
    (folder / "images.json").write_text(json.dumps(known), encoding="utf-8")
    return reopen(folder)


def reopen(folder: Path) -> TrainingData:
    """Open what `gather` left in `folder`.

    Raises:
        TrainingError: the folder was damaged.
    """
    try:
        known = json.loads((folder / "images.json").read_text(encoding="utf-8"))
        pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
        return TrainingData(
            pixels=pixels[: len(known["names"])],
            hashes=np.array(known.pop("hashes"), dtype=np.uint64),
            **known,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"the decoded images in {folder} are damaged ({error}); remove it and start again"
        ) from error


def _decoded(
    items: Iterator[Item], spec: ImageSpec, *, window: int = 64
) -> Iterator[tuple[Item, NDArray[np.uint8] | ImageError]]:
    """Decode in order, in threads, at most `window` images ahead."""

    def decode(item: Item) -> NDArray[np.uint8] | ImageError:
        if item.error is not None:
            return item.error
        try:
            return to_pixels(item.payload, spec)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = deque((item, pool.submit(decode, item)) for item in islice(items, window))
        while ahead:
            item, future = ahead.popleft()
            yield item, future.result()
            for following in islice(items, 1):
                ahead.append((following, pool.submit(decode, following)))
