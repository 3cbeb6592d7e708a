"""Every set of outliers of the protocol in trained/README.md, made by name from a seed.

    outlier_set("flip-vertical", n=500)  ->  uint8 (500, 28, 28, 1)

    other data    the test splits of the other sets in ../shared/data, scikit-learn's digits
    glyphs        `glyphs.py`, each NAME as MNIST is made, NAME-large filling the image
    corruptions   of the normal set's own test images

No score may be chosen by an `UNSEEN` set: choices are made on `DEVELOPMENT` and frozen first.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from glyphs import GLYPHS, draw
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from anomalyd.images import ImageSpec, to_pixels
from anomalyd.sources import open_source

__all__ = ["CORRUPTIONS", "DEVELOPMENT", "NAMES", "UNSEEN", "images_of", "names", "outlier_set"]

Pixels = NDArray[np.uint8]
Shape = tuple[int, int, int]
Corruption = Callable[[Pixels, np.random.Generator], Pixels]

DATA = Path(__file__).parents[3] / "shared" / "data"
GREY = (28, 28, 1)
FIFTH = 0.2


def outlier_set(
    name: str,
    shape: Shape = GREY,
    n: int = 2_000,
    seed: int = 0,
    data: Path = DATA,
    normal: str = "fashion-mnist",
) -> Pixels:
    """Images of one set: uint8 (n, *shape), fewer where the set itself has fewer.

    Args:
        name: one of `NAMES`.
        shape: height, width and channels; grey images go, unscaled, into the middle of larger
            ones and into every channel.
        n: how many, drawn without replacement where there is something to draw from.
        seed: the same seed gives the same images.
        data: the folder of the data sets.
        normal: the set in it that corruptions are made of.

    Raises:
        ValueError: no set of that name.
        OSError: fonts are missing, naming the packages.
    """
    if name not in NAMES:
        raise ValueError(f"outlier set {name!r}: there is none; there are {', '.join(NAMES)}")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name in CORRUPTIONS:
        return CORRUPTIONS[name](images_of(normal, shape, n, rng, data), rng)
    if name in SETS:
        return images_of(name, shape, n, rng, data)
    if name in DIGITS:
        return _pasted(_digits(n, rng, large=name == DIGITS[1]), shape)
    glyphs = name.removesuffix("-large")
    return _pasted(draw(glyphs, n, rng, large=name != glyphs)[..., None], shape)


def images_of(
    name: str, shape: Shape, n: int, rng: np.random.Generator, data: Path = DATA
) -> Pixels:
    """n of a set's test images: uint8 (n, *shape), by the policy of `anomalyd.images`.

    Larger images are scaled down by area and colour becomes luma; smaller ones are pasted.
    """
    source = open_source(data / name, split="test")
    chosen = set(rng.permutation(len(source))[:n].tolist())
    images = []
    for place, item in enumerate(source):
        if place in chosen:
            own = ImageSpec(28, 28, 1) if name in ("mnist", "fashion-mnist") else ImageSpec(*shape)
            images.append(to_pixels(item.payload, own))
    return _pasted(np.stack(images), shape)


def names(normal: str, *, unseen: bool = False) -> list[str]:
    """The sets that are outliers to a normal set; unseen ones only when they are asked for."""
    colour = normal == "cifar10"
    chosen = NAMES if unseen else DEVELOPMENT
    return [name for name in chosen if name != normal and (colour or name not in COLOUR)]


def _pasted(images: Pixels, shape: Shape) -> Pixels:
    height, width, channels = shape
    room = height - images.shape[1], width - images.shape[2]
    before = [part // 2 for part in room]
    edges = [(b, part - b) for b, part in zip(before, room, strict=True)]
    padded = np.pad(images, [(0, 0), *edges, (0, 0)])
    return np.broadcast_to(padded, (len(images), height, width, channels)).copy()


def _digits(n: int, rng: np.random.Generator, *, large: bool) -> Pixels:
    """scikit-learn's digits, 8x8 in 17 greys: enlarged to 28x28, or to a box of 20x20."""
    from sklearn.datasets import load_digits

    found = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    found = found[np.sort(rng.permutation(len(found))[:n])]
    side = 28 if large else 20
    spec = ImageSpec(side, side, 1, on_mismatch="resize")
    return _pasted(np.stack([to_pixels(image, spec) for image in found]), GREY)


# --- corruptions ------------------------------------------------------------------------------


def _noise(images: Pixels, rng: np.random.Generator) -> Pixels:
    return rng.integers(0, 256, images.shape, dtype=np.uint8)


def _noise_fifth(images: Pixels, rng: np.random.Generator) -> Pixels:
    hit = rng.random(images.shape) < FIFTH
    return np.where(hit, _noise(images, rng), images)


def _constant(images: Pixels, rng: np.random.Generator) -> Pixels:
    colours = rng.integers(0, 256, (len(images), 1, 1, images.shape[3]), dtype=np.uint8)
    return np.broadcast_to(colours, images.shape).copy()


def _blur(images: Pixels, _: np.random.Generator) -> Pixels:
    blurred = [
        Image.fromarray(image.squeeze()).filter(ImageFilter.GaussianBlur(1)) for image in images
    ]
    return np.stack([np.asarray(image) for image in blurred]).reshape(images.shape)


def _patch(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Sixteen uniform values in a square of 4x4 at a uniform place."""
    corrupted = images.copy()
    for image in corrupted:
        top, left = rng.integers(0, np.array(image.shape[:2]) - 3)
        patch = image[top : top + 4, left : left + 4]
        patch[:] = rng.integers(0, 256, patch.shape, dtype=np.uint8)
    return corrupted


def _line(images: Pixels, rng: np.random.Generator) -> Pixels:
    """One row or column in one value."""
    corrupted = images.copy()
    for image in corrupted:
        along = image if rng.random() < 0.5 else image.swapaxes(0, 1)
        along[rng.integers(len(along))] = rng.integers(0, 256)
    return corrupted


def _shuffled(images: Pixels, rng: np.random.Generator, *, side: int) -> Pixels:
    """Squares of side x side in another order for each image."""
    n, height, width, channels = images.shape
    down, across = height // side, width // side
    blocks = images.reshape(n, down, side, across, side, channels).swapaxes(2, 3)
    blocks = blocks.reshape(n, down * across, -1)
    order = rng.permuted(np.tile(np.arange(down * across), (n, 1)), axis=1)
    shuffled = np.take_along_axis(blocks, order[..., None], axis=1)
    shuffled = shuffled.reshape(n, down, across, side, side, channels).swapaxes(2, 3)
    return shuffled.reshape(images.shape)


CORRUPTIONS: dict[str, Corruption] = {
    "flip-horizontal": lambda images, _: images[:, :, ::-1].copy(),
    "flip-vertical": lambda images, _: images[:, ::-1].copy(),
    "rotate-90": lambda images, _: np.rot90(images, axes=(1, 2)).copy(),
    "rotate-180": lambda images, _: images[:, ::-1, ::-1].copy(),
    "noise": _noise,
    "noise-fifth": _noise_fifth,
    "blank": lambda images, _: np.zeros_like(images),
    "white": lambda images, _: np.full_like(images, 255),
    "constant": _constant,
    "contrast-half": lambda images, _: images // 2,
    "inverted": lambda images, _: 255 - images,
    "blur": _blur,
    "patch-4x4": _patch,
    "line": _line,
    "shuffled-pixels": lambda images, rng: _shuffled(images, rng, side=1),
    "shuffled-2x2": lambda images, rng: _shuffled(images, rng, side=2),
    "channels-swapped": lambda images, _: images[..., ::-1].copy(),
}
"""Name -> what is done to normal images."""

SETS = ("mnist", "fashion-mnist", "cifar10")
DIGITS = ("sklearn-digits", "sklearn-digits-large")
COLOUR = ("channels-swapped",)
_drawn = {
    unseen: [
        name
        for glyphs, of in GLYPHS.items()
        if of.unseen is unseen
        for name in (glyphs, f"{glyphs}-large")
    ]
    for unseen in (False, True)
}
DEVELOPMENT = (*SETS, *DIGITS, *_drawn[False], *CORRUPTIONS)
UNSEEN = tuple(_drawn[True])
NAMES = DEVELOPMENT + UNSEEN
