"""The one way from an image, in whatever form it comes, to the pixels that a model sees.

Training, calibration, the batch command and the daemon all call `to_pixels`, so they cannot
differ. What it does to an image, in this order:

1. refuses more bytes than the budget, formats off the allow-list (PNG, JPEG, WebP, BMP, TIFF,
   GIF, PGM/PPM/PBM, told apart by magic bytes alone), more pixels than the budget (read from the
   header, before anything is decoded) and more than one frame;
2. decodes to the last byte (a truncated file is an error) and applies the EXIF orientation;
3. reduces to 8 bits: 16-bit grey is divided by 257 and rounded, 16-bit colour keeps its high
   byte, 1-bit becomes 0 and 255, palette and CMYK become RGB; 32-bit and floating-point pixels
   are refused, for they declare no range;
4. lays transparent pixels on black; colour profiles are not applied;
5. turns RGB into Rec. 601 luma for a one-channel model, and repeats grey for a three-channel one;
6. fits the size by the policy of `ImageSpec.on_mismatch`; a model of tiles takes it as it is.

Of a JPEG that carries further pictures (MPO, gain maps) the first is taken.
Messages do not name the file: whoever asked knows it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from anomalyd.errors import (
    AnimatedImage,
    CorruptImage,
    EmptyImage,
    FormatNotAllowed,
    ImageError,
    TooManyBytes,
    TooManyPixels,
    UsageError,
    WrongSize,
)

__all__ = [
    "Header",
    "ImageSpec",
    "Limits",
    "content_hash",
    "decode",
    "read_header",
    "to_mask",
    "to_pixels",
]

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MAGIC = (
    (_PNG_MAGIC, "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
)
# Called directly and not through Image.open, which would apply Pillow's own pixel limit, as a
# warning, before ours.
_READERS: dict[str, type[ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
    "BMP": BmpImageFile,
    "WebP": WebPImageFile,
    "PNM": PpmImageFile,
}
_ALLOWED = "PNG, JPEG, WebP, BMP, TIFF, GIF, PGM and PPM are read"
_RECOGNISED = (
    (b"%PDF", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "XML or an SVG drawing"),
    (b"<!DOCTYPE", "HTML"),
    (b"<html", "HTML"),
    (b"\x1f\x8b", "gzip data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"8BPS", "a Photoshop document"),
    (b"\0\0\1\0", "an icon"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
)
# What Pillow's readers raise on hostile bytes, warnings included where a filter raises them.
# Not MemoryError: the budgets keep that for a machine that is really out of memory.
_DECODER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
)
_RESIZE = {"area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
_ON_MISMATCH = ("refuse", "crop", "resize", "tile")
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class ImageSpec:
    """The images that a model takes, and what is done with one of another size.

    Attributes:
        height, width: pixels; of one tile where on_mismatch is "tile".
        channels: 1 (grey) or 3 (RGB).
        levels: values a pixel can take in the model, 2 to 256; `to_pixels` always gives 0..255,
            binary models threshold in their graph.
        resize: the filter for scaling down, "area" (mean over the box) or "lanczos".
        on_mismatch: "refuse" scales down what has the same aspect ratio, to within one pixel,
            and refuses everything else; "crop" first cuts the centre to the aspect ratio;
            "resize" stretches to the size, and is the only one that enlarges (bilinear);
            "tile" keeps the image's own size, in which overlapping tiles are scored.
        shrink: whole factor by which an image is scaled down (mean over the box) before tiles are
            cut from it; 1 for every other policy.
    """

    height: int
    width: int
    channels: int
    levels: int = 256
    resize: str = "area"
    on_mismatch: str = "refuse"
    shrink: int = 1

    def __post_init__(self) -> None:
        for name in ("height", "width", "channels", "levels", "shrink"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"image {name} must be a whole number, not {value!r}")
        if self.height < 1 or self.width < 1:
            raise UsageError(f"image size {self.width}x{self.height}: both must be at least 1")
        if self.channels not in (1, 3):
            raise UsageError(f"image channels must be 1 or 3, not {self.channels}")
        if self.resize not in tuple(_RESIZE):  # a tuple also takes what has no hash
            raise UsageError(f"image resize must be area or lanczos, not {self.resize!r}")
        if self.on_mismatch not in _ON_MISMATCH:
            raise UsageError(
                f"image on_mismatch must be refuse, crop, resize or tile, not {self.on_mismatch!r}"
            )
        if self.shrink < 1 or (self.shrink > 1 and not self.tiled):
            raise UsageError(
                f"image shrink must be at least 1, and 1 where nothing is tiled, not {self.shrink}"
            )

    @property
    def tiled(self) -> bool:
        """Whether images keep their own sizes and are scored tile by tile."""
        return self.on_mismatch == "tile"


@dataclass(frozen=True)
class Limits:
    """Budgets for one image: encoded bytes, and pixels as its header declares them."""

    max_bytes: int = 32 << 20
    max_pixels: int = 64_000_000


_DEFAULT_LIMITS = Limits()


class Header(NamedTuple):
    """What an image says of itself before any pixel is decoded.

    Attributes:
        width, height: pixels as stored, before the EXIF orientation.
        codec: "JPEG", "WebP" or "lossless": pixels bear no trace of which lossless one it was.
        bits: of a channel, or of a palette's index.
        mode: Pillow's name for the kind of pixels: "L", "RGB", "P" and so on.
    """

    width: int
    height: int
    codec: str
    bits: int
    mode: str


def to_pixels(
    image: bytes | memoryview | Path | NDArray[np.uint8],
    spec: ImageSpec,
    limits: Limits = _DEFAULT_LIMITS,
) -> NDArray[np.uint8]:
    """Returns the image as the model sees it: uint8 `(height, width, channels)`, 0..255.

    Where the spec is tiled, height and width are the image's own.

    Args:
        image: an encoded image, the path of one, or pixels as uint8 `(H, W)`, `(H, W, 1)` or
            `(H, W, 3)`; the answer may share memory with pixels that already fit.
        spec: size, channels and size policy.
        limits: budgets in bytes and pixels.

    Raises:
        ImageError: the subclass says in which way the image is bad.
    """
    if isinstance(image, np.ndarray):
        pixels = _to_channels(_checked(image, limits), spec.channels)
    else:
        data = _read(image, limits) if isinstance(image, Path) else image
        pixels = decode(data, spec.channels, limits)
    return _fit(pixels, spec)


def decode(
    data: bytes | memoryview, channels: int, limits: Limits = _DEFAULT_LIMITS
) -> NDArray[np.uint8]:
    """Returns an encoded image at its own size: uint8 `(h, w, channels)`, 0..255.

    Raises:
        ImageError: the subclass says in which way the image is bad.
    """
    if len(data) == 0:
        raise EmptyImage("image is empty: 0 bytes; send the bytes of an image file")
    _check_bytes(len(data), limits)
    data = bytes(data)
    kind = _format(data)
    with _decoding(kind):
        pixels = _plain_png(data, limits) if kind == "PNG" else None
        if pixels is None:
            pixels = _to_8_bit(_load(data, kind, limits), kind)
    return _to_channels(pixels, channels)


def read_header(
    image: bytes | memoryview | Path | NDArray[np.uint8], limits: Limits = _DEFAULT_LIMITS
) -> Header:
    """Returns what the header of an image says; nothing is decoded.

    Args:
        image: as for `to_pixels`; bare pixels are 8 bits and lossless.
        limits: budgets in bytes and pixels.

    Raises:
        ImageError: the subclass says in which way the header is bad.
    """
    if isinstance(image, np.ndarray):
        height, width, *channels = image.shape
        return Header(width, height, "lossless", 8, "RGB" if channels == [3] else "L")
    data = bytes(_read(image, limits) if isinstance(image, Path) else image)
    kind = _format(data)
    with _decoding(kind):
        opened = _open(data, kind, limits)
        lossless = data[12:16] == b"VP8L" if kind == "WebP" else kind != "JPEG"
        if opened.info.get("compression") == "jpeg":
            kind, lossless = "JPEG", False  # within a TIFF
        codec = "lossless" if lossless else kind
        return Header(*opened.size, codec, _bits(data, kind, opened), opened.mode)


def to_mask(
    image: Path, spec: ImageSpec, shape: tuple[int, int], limits: Limits = _DEFAULT_LIMITS
) -> NDArray[np.bool_]:
    """Returns which pixels of an image's map a mask marks: those where it is not black.

    A mask of the map's own shape is taken as it is; any other goes the way of the image that it
    belongs to, by the policy of `ImageSpec.on_mismatch`, but takes the nearest pixel.

    Args:
        image: the path of the mask.
        spec: of the image.
        shape: (H, W) of the map.
        limits: budgets in bytes and pixels.

    Returns:
        bool (H, W).

    Raises:
        ImageError: the subclass says in which way the mask is bad.
    """
    mask = decode(_read(image, limits), 1, limits)[..., 0] > 0
    if mask.shape == shape:
        return mask
    height, width = mask.shape
    box = _box(width, height, spec)
    fitted = Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST, box)
    return np.asarray(fitted)


def content_hash(pixels: NDArray[np.uint8]) -> int:
    """Returns 8 bytes of BLAKE2b over shape and pixels, as an integer in [0, 2**64)."""
    digest = hashlib.blake2b(struct.pack(f"<{pixels.ndim}Q", *pixels.shape), digest_size=8)
    digest.update(np.ascontiguousarray(pixels).data)
    return int.from_bytes(digest.digest(), "little")


# --- budgets and kinds ------------------------------------------------------------------------


def _read(path: Path, limits: Limits) -> bytes:
    try:
        # Not blocking, so that a pipe in a folder of images is refused and not waited for.
        file = os.open(path, _READ_FLAGS)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptImage("image is not a regular file; give the path of an image file")
            _check_bytes(status.st_size, limits)
            return os.read(file, status.st_size)
        finally:
            os.close(file)
    except OSError as error:
        raise CorruptImage(f"image cannot be read: {error.strerror or error}") from error


def _check_bytes(count: int, limits: Limits) -> None:
    if count > limits.max_bytes:
        raise TooManyBytes(
            f"image has {count:,} bytes; at most {limits.max_bytes:,} are read: send it smaller"
        )


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise CorruptImage(f"image is damaged: its header declares {width}x{height} pixels")
    if width * height > limits.max_pixels:
        raise TooManyPixels(
            f"image has {width}x{height} pixels; at most {limits.max_pixels:,} are decoded: "
            "scale it down first"
        )


def _format(data: bytes) -> str:
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in b" \t\r\n#":
        return "PNM"
    head = data[:256].lstrip()
    what = next((name for magic, name in _RECOGNISED if head.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        what = "AVIF, HEIC or a video"
    said = f"image is {what}" if what else f"image starts with unknown bytes {data[:8]!r}"
    raise FormatNotAllowed(f"{said}; {_ALLOWED}: convert it to PNG")


# --- decoding ---------------------------------------------------------------------------------


@contextmanager
def _decoding(kind: str) -> Iterator[None]:
    """Turns what readers raise on damaged bytes into an ImageError that names the format."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(f"{kind} image holds a part of too many pixels: {error}") from error
    except _DECODER_ERRORS as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise CorruptImage(
            f"{kind} image is truncated or damaged ({what}); get it again from its source"
        ) from error


def _open(data: bytes, kind: str, limits: Limits) -> ImageFile:
    """Pillow's image of exactly one frame within the pixel budget, not yet decoded."""
    # These two readers allocate when they open, so their headers are read before.
    if kind == "GIF":
        _check_gif(data, limits)
    elif kind == "WebP":
        _check_webp(data, limits)
    image = _READERS[kind](BytesIO(data))
    _check_pixels(*image.size, limits)
    if getattr(image, "is_animated", False):
        raise _animated(kind)
    return image


def _bits(data: bytes, kind: str, image: ImageFile) -> int:
    """Bits of a channel, which Pillow's mode does not always tell."""
    if kind == "PNG":
        return data[24]
    if isinstance(image, TiffImageFile):
        return int(max(image.tag_v2.get(258, (1,))))
    return 1 if image.mode == "1" else 16 if image.mode.startswith("I") else 8


def _load(data: bytes, kind: str, limits: Limits) -> ImageFile:
    """Pillow's image, whole and upright."""
    image = _open(data, kind, limits)
    image.load()
    if kind == "PNG" and "transparency" in image.info:
        _scale_clear(image, depth=data[24], colour=data[25])
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _scale_clear(image: ImageFile, *, depth: int, colour: int) -> None:
    """Scale the transparent value as Pillow has scaled the pixels of a PNG, and not it."""
    if colour == 0 and depth in (2, 4):
        image.info["transparency"] *= 255 // (2**depth - 1)
    elif colour == 2 and depth == 16:
        raise FormatNotAllowed(
            "PNG image of 16 bits names a transparent colour, which its 8 upper bits do not tell "
            "from others; save it with an alpha channel"
        )


def _animated(kind: str) -> AnimatedImage:
    return AnimatedImage(f"{kind} image has more than one frame; send one image per frame")


def _check_gif(data: bytes, limits: Limits) -> None:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    _check_pixels(width, height, limits)
    at = 13 + _gif_table(flags)
    frames = 0
    while (block := data[at]) != 0x3B:  # the trailer
        if block == 0x2C:
            left, top, width, height, flags = struct.unpack_from("<4HB", data, at + 1)
            _check_pixels(left + width, top + height, limits)
            frames += 1
            at += 11 + _gif_table(flags)
        elif block == 0x21:
            at += 2
        else:
            raise CorruptImage(f"GIF image is damaged: unknown block {block:#04x}")
        while size := data[at]:
            at += 1 + size
        at += 1
    if frames > 1:
        raise _animated("GIF")


def _gif_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _check_webp(data: bytes, limits: Limits) -> None:
    if len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise CorruptImage("WebP image is truncated: its header declares more bytes")
    chunk = data[12:16]
    if chunk == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
    elif chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", data, 26))
    _check_pixels(width, height, limits)


class _Png(NamedTuple):
    width: int
    height: int
    layout: tuple[int, int, int]  # bit depth, colour type, interlace
    kinds: set[bytes]
    pixels: bytes  # the concatenated IDAT chunks, compressed


# Chunks that change nothing about the pixels as they are read here.
_NEUTRAL = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"sBIT"}
_PLAIN = {(8, 0, 0): "L", (8, 2, 0): "RGB"}


def _plain_png(data: bytes, limits: Limits) -> NDArray[np.uint8] | None:
    """Pixels of an 8-bit grey or RGB PNG without anything special, else None.

    Pillow's decompressor without its chunk reader: the same pixels, at twice the speed for a
    thumbnail, and every checksum is verified.
    """
    png = _png(data)
    _check_pixels(png.width, png.height, limits)
    mode = _PLAIN.get(png.layout)
    if mode is None or not png.kinds <= _NEUTRAL:
        return None
    size = (png.width, png.height)
    pixels = Image.frombytes(mode, size, png.pixels, "zip", mode, 0).tobytes()
    return np.frombuffer(pixels, np.uint8).reshape(png.height, png.width, len(mode))


def _png(data: bytes) -> _Png:
    width, height, depth, colour, interlace = struct.unpack_from(">IIBBxxB", data, 16)
    kinds: set[bytes] = set()
    parts = []
    view = memoryview(data)
    at = len(_PNG_MAGIC)
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise CorruptImage(
                f"PNG image is truncated or damaged: checksum of its chunk {kind!r} at byte {at}"
            )
        if not kinds and (kind != b"IHDR" or length != 13):
            raise CorruptImage("PNG image is damaged: it does not start with its header")
        kinds.add(kind)
        if kind == b"IDAT":
            parts.append(view[at + 8 : end])
        elif kind == b"acTL" and data[at + 8 : at + 12] != b"\0\0\0\1":
            raise _animated("PNG")
        at = end + 4
    return _Png(width, height, (depth, colour, interlace), kinds, b"".join(parts))


# --- pixels -----------------------------------------------------------------------------------


def _to_8_bit(image: ImageFile, kind: str) -> NDArray[np.uint8]:
    """Grey `(h, w)` or RGB `(h, w, 3)`."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PNM")):
        return _from_16_bit(image)
    if mode in ("LA", "La") or (mode in ("1", "L") and "transparency" in image.info):
        return _on_black(np.asarray(image.convert("LA")))[..., 0]
    if mode in ("RGBA", "RGBa", "PA") or (mode in ("P", "RGB") and "transparency" in image.info):
        return _on_black(np.asarray(image.convert("RGBA")))
    if mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if mode in ("P", "RGB", "RGBX", "CMYK", "YCbCr"):
        return np.asarray(image.convert("RGB"))
    raise FormatNotAllowed(
        f"{kind} image has pixels of kind {mode!r}, whose range is not declared; "
        "save it with 8 or 16 bits"
    )


def _from_16_bit(image: ImageFile) -> NDArray[np.uint8]:
    """round(255 * value / peak); the peak is 65535, less in a TIFF of fewer bits."""
    bits, white_is_zero = 16, False
    if isinstance(image, TiffImageFile):
        bits = int(image.tag_v2.get(258, (16,))[0])
        white_is_zero = image.tag_v2.get(262) == 0
    peak = (1 << bits) - 1
    # 32 bits hold 255 * peak.
    values: NDArray[np.uint32] = np.clip(np.asarray(image), 0, peak).astype(np.uint32)
    if white_is_zero:
        values = peak - values
    if (clear := image.info.get("transparency")) is not None:
        values[values == clear] = 0
    return ((values * 255 + peak // 2) // peak).astype(np.uint8)


def _on_black(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """round(colour * alpha / 255), the last channel being alpha."""
    colour, alpha = pixels[..., :-1].astype(np.uint16), pixels[..., -1:]
    return ((colour * alpha + 127) // 255).astype(np.uint8)


def _checked(pixels: NDArray[np.uint8], limits: Limits) -> NDArray[np.uint8]:
    if pixels.dtype != np.uint8:
        raise WrongSize(
            f"pixels are {pixels.dtype}; uint8 in 0..255 is read, for other types declare no "
            "range: scale and cast them first"
        )
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise WrongSize(
            f"pixels have shape {pixels.shape}; (H, W), (H, W, 1) or (H, W, 3) is read"
        )
    if pixels.size == 0:
        raise EmptyImage(f"image is empty: pixels of shape {pixels.shape}")
    _check_pixels(pixels.shape[1], pixels.shape[0], limits)
    return pixels


def _to_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return pixels.repeat(3, axis=2)
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]  # Rec. 601


# --- size -------------------------------------------------------------------------------------


def _fit(pixels: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.uint8]:
    height, width, channels = pixels.shape
    if spec.tiled:
        least = spec.height * spec.shrink, spec.width * spec.shrink
        if height < least[0] or width < least[1]:
            raise WrongSize(
                f"image is {width}x{height}; the model reads tiles of {least[1]}x{least[0]}, and "
                "images are not enlarged: send it larger, or train with a smaller --image-size"
            )
        return np.ascontiguousarray(pixels)
    if (height, width) == (spec.height, spec.width):
        return np.ascontiguousarray(pixels)
    left, top, right, bottom = box = _box(width, height, spec)
    grows = right - left < spec.width or bottom - top < spec.height
    if grows and spec.on_mismatch != "resize":
        raise _wrong_size(width, height, spec, "and images are not enlarged")
    resample = Image.Resampling.BILINEAR if grows else _RESIZE[spec.resize]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    fitted = image.resize((spec.width, spec.height), resample, box)
    return np.asarray(fitted).reshape(spec.height, spec.width, channels)


def _box(width: int, height: int, spec: ImageSpec) -> tuple[int, int, int, int]:
    """The part of the image that is scaled: left, top, right, bottom."""
    if spec.on_mismatch == "crop":
        across = min(width, max(1, round(height * spec.width / spec.height)))
        down = min(height, max(1, round(width * spec.height / spec.width)))
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down
    # One pixel more or less in the image itself is what rounding an exact ratio can leave.
    off = abs(width * spec.height - height * spec.width)
    if spec.on_mismatch == "refuse" and off > max(spec.height, spec.width):
        raise _wrong_size(width, height, spec, "and the aspect ratio differs")
    return 0, 0, width, height


def _wrong_size(width: int, height: int, spec: ImageSpec, why: str) -> WrongSize:
    return WrongSize(
        f"image is {width}x{height}; the model takes {spec.width}x{spec.height}, {why}: "
        "crop or scale it first, or train with on_mismatch = crop, resize or tile"
    )
