"""Training images, decoded once by the serving path into one memory-mapped array.

Images of one size are the rows of pixels.npy; photographs, of which random crops are trained on,
lie at their own sizes one after the other in photographs.bin.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anomalyd.detect.pipeline import item_name
from anomalyd.detect.tiling import shrunk
from anomalyd.errors import ImageError, TrainingError, UsageError
from anomalyd.images import ImageSpec, content_hash, to_pixels
from anomalyd.train.progress import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from anomalyd.sources import Item, Source

__all__ = [
    "Photographs",
    "TrainingData",
    "claim",
    "classes_of",
    "crops",
    "dithered",
    "excluded",
    "forget",
    "gather",
    "per_tile",
    "reopen",
]

PIXELS, PHOTOGRAPHS = "pixels.npy", "photographs.bin"


@dataclass(frozen=True, eq=False)
class Photographs:
    """Images of unlike sizes, as a sequence, and the random crops of them that are trained on.

    Attributes:
        flat: uint8, memory-mapped: all pixels of all images.
        shapes: N shapes (H, W, C).
        tile: height and width of a crop after scaling down.
        shrink: whole factor by which it is scaled down.
    """

    flat: NDArray[np.uint8]
    shapes: list[tuple[int, int, int]]
    tile: tuple[int, int]
    shrink: int = 1

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """One image, uint8 (H, W, C)."""
        shape, start = self.shapes[row], self.starts[row]
        return self.flat[start : start + math.prod(shape)].reshape(shape)

    @cached_property
    def starts(self) -> list[int]:
        """Where each image begins in `flat`."""
        return [0, *accumulate(math.prod(shape) for shape in self.shapes)]

    def crops(self, rows: NDArray[np.int64], seed: Sequence[int]) -> NDArray[np.uint8]:
        """A random tile of each row, uint8 (n, height, width, C); equal seeds cut equal tiles."""
        corner = np.random.default_rng(seed).random((len(rows), 2))
        height, width = (side * self.shrink for side in self.tile)
        tiles = []
        for (down, across), row in zip(corner.tolist(), rows.tolist(), strict=True):
            # Cut first and scaled down then: at any pixel, not only where boxes begin.
            image = self[row]
            top = int(down * (image.shape[0] - height + 1))
            left = int(across * (image.shape[1] - width + 1))
            tiles.append(shrunk(image[top : top + height, left : left + width], self.shrink))
        return np.stack(tiles)


def crops(
    pixels: NDArray[np.uint8] | Photographs, rows: NDArray[np.int64], seed: Sequence[int]
) -> NDArray[np.uint8]:
    """The images of some rows as the model trains on them: whole, or a random tile of each.

    Args:
        pixels: all images.
        rows: int64 (n,), which ones; a row may occur more than once.
        seed: of the tiles.

    Returns:
        uint8 (n, height, width, channels).
    """
    return pixels.crops(rows, seed) if isinstance(pixels, Photographs) else pixels[rows]


def dithered(pixels: NDArray[np.uint8], levels: int, seed: Sequence[int]) -> NDArray[np.uint8]:
    """Draw one of the two nearest levels for each value; the mean over draws is the value itself.

    With two levels this is known as dynamic binarization.

    References:
        On the Quantitative Analysis of Deep Belief Networks (Salakhutdinov, Murray, 2008).

    Args:
        pixels: uint8, of any shape.
        levels: L; with 256 nothing changes.
        seed: equal seeds draw equal levels.

    Returns:
        uint8 likewise, each value one that quantises to the level drawn.
    """
    # In whole numbers: in float32 white, plus a number just below one, is a level too many.
    below, above = np.divmod(pixels.astype(np.int32) * (levels - 1), 255)
    drawn = np.random.default_rng(seed).random(pixels.shape, dtype=np.float32) * 255
    level = below + (drawn < above)
    # The least byte whose level it is: floor(byte L / 256) is the level again.
    return (-(-level * 256 // levels)).astype(np.uint8)


def per_tile(
    pixels: NDArray[np.uint8] | Photographs, rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows as often as tiles fill each photograph, so that one pass over them sees its area.

    Args:
        pixels: all images; where they are of one size, rows stay as they are.
        rows: int64 (n,).
    """
    if not isinstance(pixels, Photographs):
        return rows
    tile = math.prod(pixels.tile) * pixels.shrink**2
    areas = [math.prod(pixels.shapes[row][:2]) for row in rows.tolist()]
    return np.repeat(rows, [max(1, round(area / tile)) for area in areas])


@dataclass(frozen=True)
class TrainingData:
    """Decoded images and what is known of each.

    Attributes:
        pixels: uint8 (N, H, W, C), memory-mapped, or photographs of unlike sizes.
        hashes: uint64 (N,) content hashes.
        names: N sources, `path` or `path#index`.
        groups: N group names or None.
        labels: N class names or None.
        unreadable: `name: reason` of what was left out.
    """

    pixels: NDArray[np.uint8] | Photographs
    hashes: NDArray[np.uint64]
    names: list[str]
    groups: list[str | None]
    labels: list[str | None]
    unreadable: list[str]

    @property
    def digest(self) -> str:
        """SHA-256 over the content hashes in order: which data a bundle was made from."""
        return hashlib.sha256(self.hashes.astype("<u8").tobytes()).hexdigest()


def excluded(path: Path | None) -> list[set[str]]:
    """Read an `--exclude` file: one name a line; the first column of a CSV counts.

    Returns:
        of each line what it may name: the whole of it, for a name may have commas, or its first
        field. The header of a strangest.csv names nothing.

    Raises:
        UsageError: the file cannot be read.
    """
    if path is None:
        return []
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        fields = [next(csv.reader([line]))[0] for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--exclude {path} cannot be read: {error}") from error
    return [
        {line.strip(), field.strip()}
        for line, field in zip(lines, fields, strict=True)
        if not line.startswith("image,p_value")
    ]


def gather(
    source: Source,
    spec: ImageSpec,
    folder: Path,
    *,
    exclude: Sequence[set[str]] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> TrainingData:
    """Decode `source` into one file in `folder`, image by image, reading nothing twice.

    Args:
        source: images in order.
        spec: the shape and size policy that the bundle will have.
        folder: an existing folder for the array.
        exclude: images to leave out, each by the names that it may have.
        advance: called with the number of images done, for a progress bar.

    Raises:
        TrainingError: no readable image at all.
    """
    if not len(source):
        raise TrainingError(f"{source.name} holds no images")
    hashes: list[int] = []
    names: list[str] = []
    groups: list[str | None] = []
    labels: list[str | None] = []
    unreadable: list[str] = []
    shapes: list[tuple[int, ...]] = []
    listed: set[str] = set().union(*exclude)
    found: set[str] = set()

    def kept() -> Iterator[Item]:
        for item in source:
            if (name := item_name(item)) in listed:
                found.add(name)
            else:
                yield item

    with _keeping(folder, spec, len(source)) as keep:
        for item, pixels in _decoded(kept(), spec):
            name = item_name(item)
            if isinstance(pixels, ImageError):
                unreadable.append(f"{name}: {pixels}")
            else:
                keep(len(names), pixels)
                hashes.append(content_hash(pixels))
                names.append(name)
                groups.append(item.group)
                labels.append(item.label)
                shapes.append(pixels.shape)
            advance(1)
    missed = sum(found.isdisjoint(names) for names in exclude)
    if missed:
        say(f"--exclude: {missed:,} of {len(exclude):,} names are of no image of {source.name}")
    if not names:
        raise TrainingError(
            f"no image of {source.name} could be used; the first says: {unreadable[0]}"
            if unreadable
            else f"--exclude leaves no image of {source.name}"
        )
    known = {
        "hashes": hashes,
        "names": names,
        "groups": groups,
        "labels": labels,
        "unreadable": unreadable,
        "photographs": {"shapes": shapes, "tile": [spec.height, spec.width], "shrink": spec.shrink}
        if spec.tiled
        else None,
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
        photographs = known.pop("photographs")
        pixels: NDArray[np.uint8] | Photographs
        if photographs is None:
            rows = np.load(folder / PIXELS, mmap_mode="r", allow_pickle=False)
            pixels = rows[: len(known["names"])]
        else:
            flat = np.memmap(folder / PHOTOGRAPHS, np.uint8, "r")
            pixels = Photographs(flat, **photographs)
        return TrainingData(
            pixels=pixels,
            hashes=np.array(known.pop("hashes"), dtype=np.uint64),
            **known,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"the decoded images in {folder} are damaged ({error}); remove it and start again"
        ) from error


@contextmanager
def _keeping(
    folder: Path, spec: ImageSpec, most: int
) -> Iterator[Callable[[int, NDArray[np.uint8]], None]]:
    """Yields what puts an image, given its row, into the file of all images."""
    if spec.tiled:
        with (folder / PHOTOGRAPHS).open("wb") as file:
            yield lambda _, pixels: pixels.tofile(file)
        return
    shape = (most, spec.height, spec.width, spec.channels)
    rows = np.lib.format.open_memmap(folder / PIXELS, mode="w+", dtype=np.uint8, shape=shape)
    yield rows.__setitem__
    rows.flush()


def forget(folder: Path) -> None:
    """Remove the decoded images: the user has the images themselves, and this copy is ours."""
    for name in (PIXELS, PHOTOGRAPHS):
        (folder / name).unlink(missing_ok=True)


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


def claim(folder: Path) -> None:
    """Make the run folder, unless a run that could be resumed lives there."""
    if (folder / "job.json").exists():
        raise UsageError(
            f"{folder} holds an interrupted run; continue it with --resume, or remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}") from error


def classes_of(images: TrainingData) -> tuple[list[str], NDArray[np.int64]]:
    """Return the names of the classes in order, and the class of each image."""
    missing = [name for name, label in zip(images.names, images.labels, strict=True) if not label]
    if missing:
        raise TrainingError(
            f"--labels: {len(missing):,} images have no label, {missing[0]} the first; label them "
            "or leave them out with --exclude"
        )
    found = {str(label) for label in images.labels}
    # Numbers in the order of numbers, then words.
    names = sorted(
        found,
        key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name),
    )
    if len(names) < 2:
        raise TrainingError(f"--labels: there is one class only, {names[0]!r}; train without it")
    index = {name: place for place, name in enumerate(names)}
    return names, np.array([index[str(label)] for label in images.labels], np.int64)
