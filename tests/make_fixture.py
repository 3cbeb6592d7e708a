"""Makes tests/fixtures from the full Fashion-MNIST and MNIST sets (given as IDX .gz files).

    python tests/make_fixture.py ../shared/data

The first images of each split, in the order of the full sets, and a few of them as PNG files,
one with noise added.
The output depends on the input alone: gzip's time stamp is zero.
"""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COUNTS = {
    "fashion-mnist": {"train": 300, "t10k": 200},
    "mnist": {"train": 100, "t10k": 200},
}
# file name -> (set, class); the first image of that class in the test split
PICTURES = {
    "shirt": ("fashion-mnist", 6),
    "trousers": ("fashion-mnist", 1),
    "boot": ("fashion-mnist", 9),
    "digit": ("mnist", 4),
}


def read_idx(path: Path) -> NDArray[np.uint8]:
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = struct.unpack_from(f">{rank}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), 9, mtime=0))


def with_noise(images: NDArray[np.uint8], share: float = 0.2, seed: int = 0) -> NDArray[np.uint8]:
    """Images in which about a `share` of the pixels is replaced by uniform noise."""
    rng = np.random.default_rng(seed)
    hit = rng.random(images.shape) < share
    return np.where(hit, rng.integers(0, 256, images.shape, dtype=np.uint8), images)


def main(full: Path, out: Path) -> None:
    for name, counts in COUNTS.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for split, count in counts.items():
            for kind in ("images-idx3", "labels-idx1"):
                file = f"{split}-{kind}-ubyte.gz"
                write_idx(out / name / file, read_idx(full / name / file)[:count])
    (out / "images").mkdir(exist_ok=True)
    for picture, (name, label) in PICTURES.items():
        images = read_idx(full / name / "t10k-images-idx3-ubyte.gz")
        labels = read_idx(full / name / "t10k-labels-idx1-ubyte.gz")
        first = int(np.argmax(labels == label))
        Image.fromarray(images[first]).save(out / "images" / f"{picture}.png", optimize=True)
    shirt = np.asarray(Image.open(out / "images" / "shirt.png"))
    Image.fromarray(with_noise(shirt)).save(out / "images" / "noisy-shirt.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).resolve().parent / "fixtures")
