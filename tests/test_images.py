"""The one decoder: what it reads, by which rule, and how it refuses the rest."""

from __future__ import annotations

import io
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms, features

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
from anomalyd.images import (
    Header,
    ImageSpec,
    Limits,
    content_hash,
    decode,
    read_header,
    to_mask,
    to_pixels,
)

GREY = ImageSpec(height=28, width=28, channels=1)
LIMITS = Limits()


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, data, *, before=b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def shirt(request) -> bytes:
    return (request.getfixturevalue("fixture_data") / "images" / "shirt.png").read_bytes()


@pytest.fixture(scope="module")
def grey(shirt):
    return np.asarray(Image.open(io.BytesIO(shirt)))


@pytest.fixture(scope="module")
def photo():
    """A colour ramp with texture, 40 wide and 30 high."""
    y, x = np.mgrid[:30, :40]
    return np.stack([x * 6, y * 8, (x * y) % 251], -1).astype(np.uint8)


# --- what is read, and by which rule ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "PPM"])
def test_lossless_formats_give_the_same_pixels(kind, grey):
    """One picture, five lossless formats, the same bytes for the model."""
    pixels = to_pixels(encoded(grey, kind), GREY)
    assert pixels.shape == (28, 28, 1)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels[..., 0], grey)


def test_webp_and_jpeg_are_read(photo):
    """Lossless WebP is exact, JPEG is near."""
    np.testing.assert_array_equal(decode(encoded(photo, "WEBP", lossless=True), 3, LIMITS), photo)
    jpeg = decode(encoded(photo, "JPEG", quality=95, subsampling=0), 3, LIMITS)
    assert np.abs(jpeg.astype(int) - photo).mean() < 5


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits"])
def test_compressed_tiff_is_read(compression, photo):
    """TIFF's lossless compressions are exact."""
    np.testing.assert_array_equal(
        decode(encoded(photo, "TIFF", compression=compression), 3, LIMITS), photo
    )


def test_every_way_to_hand_over_an_image_gives_the_same(fixture_data, shirt, grey):
    """Path, bytes, memoryview and the three array shapes agree."""
    expected = grey[..., None]
    for image in (
        fixture_data / "images" / "shirt.png",
        shirt,
        memoryview(shirt),
        grey,
        grey[..., None],
        np.repeat(grey[..., None], 3, axis=2),
    ):
        np.testing.assert_array_equal(to_pixels(image, GREY), expected)


@given(
    pixels=st.one_of(
        arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))),
        arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))),
    )
)
def test_png_round_trip(pixels):
    """Any 8-bit picture comes back from PNG as it was, whatever row filters were chosen."""
    channels = 3 if pixels.ndim == 3 else 1
    expected = pixels.reshape(*pixels.shape[:2], channels)
    np.testing.assert_array_equal(decode(encoded(pixels), channels, LIMITS), expected)


def test_the_fast_way_agrees_with_pillow(photo):
    """A PNG with a text chunk takes Pillow's reader, the plain one ours; the pixels agree."""
    plain = encoded(photo)
    text = plain[:33] + chunk(b"tEXt", b"Comment\0hello") + plain[33:]
    np.testing.assert_array_equal(decode(plain, 3, LIMITS), decode(text, 3, LIMITS))


@settings(max_examples=40)
@given(values=arrays(np.uint16, (3, 5)))
def test_16_bit_grey_is_divided_by_257_and_rounded(values):
    """PNG, TIFF and PGM of 16 bits are scaled to the nearest, not clipped and not shifted."""
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)[..., None]
    pgm = b"P5 5 3 65535\n" + values.astype(">u2").tobytes()
    for data in (encoded(values), encoded(values, "TIFF"), pgm):
        np.testing.assert_array_equal(decode(data, 1, LIMITS), expected)


def test_8_bit_grey_survives_16_bits(grey):
    """v * 257 is v again."""
    np.testing.assert_array_equal(
        to_pixels(encoded(grey.astype(np.uint16) * 257), GREY)[..., 0], grey
    )


def test_16_bit_tiff_where_white_is_zero_is_inverted():
    """PhotometricInterpretation 0 means that 0 is white."""
    values = np.array([[0, 65535, 257]], np.uint16)
    data = encoded(values, "TIFF", tiffinfo={262: 0})
    assert decode(data, 1, LIMITS).ravel().tolist() == [255, 0, 254]


def test_1_bit_becomes_black_and_white():
    """A bitmap has 0 and 255, not 0 and 1."""
    bits = np.array([[True, False, True]])
    for kind in ("PNG", "TIFF", "PPM", "BMP"):
        assert decode(encoded(Image.fromarray(bits), kind), 1, LIMITS).ravel().tolist() == [
            255,
            0,
            255,
        ]


def test_palette_becomes_its_colours(photo):
    """A palette image is its colours, never its indices."""
    palette = Image.fromarray(photo).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    for kind in ("PNG", "GIF", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode(encoded(palette, kind), 3, LIMITS), expected)


@given(pixel=st.tuples(*[st.integers(0, 255)] * 4))
def test_transparency_is_laid_on_black(pixel):
    """Colour times alpha, rounded to the nearest."""
    rgba = np.array([[pixel]], np.uint8)
    expected = [int(c * pixel[3] / 255 + 0.5) for c in pixel[:3]]
    assert decode(encoded(rgba), 3, LIMITS).ravel().tolist() == expected
    la = rgba[..., [0, 3]]
    assert decode(encoded(Image.fromarray(la, "LA")), 1, LIMITS).ravel().tolist() == expected[:1]


def test_a_transparent_colour_is_black(photo):
    """tRNS in palette, grey, 16-bit grey and RGB images blackens what it names."""
    palette = Image.fromarray(photo).quantize(8)
    index = int(np.asarray(palette)[0, 0])
    pixels = decode(encoded(palette, transparency=index), 3, LIMITS)
    assert (pixels[np.asarray(palette) == index] == 0).all()
    grey = np.array([[7, 8]], np.uint8)
    assert decode(encoded(grey, transparency=7), 1, LIMITS).ravel().tolist() == [0, 8]
    deep = png(2, 1, 16, 0, b"\0\x07\x00\x08\x08", before=chunk(b"tRNS", b"\x07\x00"))
    assert decode(deep, 1, LIMITS).ravel().tolist() == [0, 8]
    for depth, row, expected in ((2, b"\0\x60", [0, 170]), (4, b"\0\x12", [0, 34])):
        few = png(2, 1, depth, 0, row, before=chunk(b"tRNS", b"\0\1"))
        assert decode(few, 1, LIMITS).ravel().tolist() == expected
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    kept = decode(encoded(rgb, transparency=(1, 2, 3)), 3, LIMITS)
    assert kept.ravel().tolist() == [0, 0, 0, 4, 5, 6]
    deep = png(1, 1, 16, 2, b"\0" + b"\0\7" * 3, before=chunk(b"tRNS", b"\0\7" * 3))
    with pytest.raises(FormatNotAllowed, match="with an alpha channel"):
        decode(deep, 3, LIMITS)


def test_cmyk_jpeg_becomes_rgb(photo):
    """CMYK, with Adobe's inversion, shows the colours it stands for."""
    cmyk = Image.fromarray(photo).convert("CMYK")
    pixels = decode(encoded(cmyk, "JPEG", quality=95), 3, LIMITS)
    assert np.abs(pixels.astype(int) - photo).mean() < 10


def test_rgb_becomes_rec_601_luma():
    """Y = 0.299 R + 0.587 G + 0.114 B, from files and from arrays alike."""
    rgb = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]], np.uint8)
    spec = ImageSpec(1, 4, 1)
    assert to_pixels(rgb, spec).ravel().tolist() == [76, 150, 29, 9]
    assert to_pixels(encoded(rgb), spec).ravel().tolist() == [76, 150, 29, 9]


def test_grey_is_repeated_for_a_colour_model(shirt, grey):
    """Three equal channels."""
    pixels = to_pixels(shirt, ImageSpec(28, 28, 3))
    assert pixels.shape == (28, 28, 3)
    assert (pixels == grey[..., None]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind, orientation):
    """Whatever way the camera was held, the bright corner ends up at the top left."""
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 255
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = Image.fromarray(upright)
    stored = stored if undo is None else stored.transpose(undo)
    exif = Image.Exif()
    exif[274] = orientation
    pixels = decode(encoded(stored, kind, exif=exif.tobytes()), 1, LIMITS)
    assert pixels.shape == (16, 24, 1)
    assert np.abs(pixels[..., 0].astype(int) - upright).max() < 40


def test_a_jpeg_with_further_pictures_is_its_first(photo):
    """Phones append gain maps and previews (MPO); they are no animation."""
    first = Image.fromarray(photo)
    data = encoded(first, "MPO", save_all=True, append_images=[Image.fromarray(255 - photo)])
    np.testing.assert_array_equal(
        decode(data, 3, LIMITS), decode(encoded(first, "JPEG"), 3, LIMITS)
    )


def test_a_single_frame_is_no_animation(grey):
    """GIF, WebP and TIFF of one frame are read."""
    for kind in ("GIF", "WEBP", "TIFF"):
        assert decode(encoded(grey, kind, save_all=True), 1, LIMITS).shape == (28, 28, 1)


# --- size -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "policy", "fits"),
    [
        ((28, 28), "refuse", True),
        ((56, 56), "refuse", True),
        ((56, 57), "refuse", True),
        ((1000, 1001), "refuse", True),
        ((56, 58), "refuse", False),
        ((27, 28), "refuse", False),
        ((14, 14), "refuse", False),
        ((56, 90), "crop", True),
        ((90, 28), "crop", True),
        ((90, 27), "crop", False),
        ((14, 90), "resize", True),
        ((1, 1), "resize", True),
    ],
)
def test_size_policy(size, policy, fits):
    """Only the policy that says so crops, stretches or enlarges; the rest is an error."""
    pixels = np.full(size, 77, np.uint8)
    spec = ImageSpec(28, 28, 1, on_mismatch=policy)
    if fits:
        assert (to_pixels(pixels, spec) == 77).all()
        assert to_pixels(pixels, spec).shape == (28, 28, 1)
    else:
        with pytest.raises(WrongSize, match=f"{size[1]}x{size[0]}; the model takes 28x28"):
            to_pixels(pixels, spec)


def test_area_takes_the_mean_of_the_box():
    """Four pixels become their mean."""
    pixels = np.kron(np.array([[0, 100], [200, 40]]), np.ones((2, 2))).astype(np.uint8)
    pixels[0, 0] = 40
    assert to_pixels(pixels, ImageSpec(2, 2, 1)).ravel().tolist() == [10, 100, 200, 40]


def test_crop_takes_the_centre():
    """Of a wide image the middle square is left."""
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = (10, 20, 30)
    fitted = to_pixels(pixels, ImageSpec(5, 5, 3, on_mismatch="crop"))
    assert (fitted == np.array([10, 20, 30])).all()


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    policy=st.sampled_from(["refuse", "crop", "resize"]),
    resize=st.sampled_from(["area", "lanczos"]),
)
def test_the_answer_always_has_the_asked_shape(height, width, channels, policy, resize):
    """Any size either fits exactly or is a WrongSize."""
    spec = ImageSpec(8, 12, channels, resize=resize, on_mismatch=policy)
    try:
        pixels = to_pixels(np.zeros((height, width), np.uint8), spec)
    except WrongSize:
        assert policy != "resize"
    else:
        assert pixels.shape == (8, 12, channels)
        assert pixels.flags.c_contiguous


@pytest.mark.parametrize(
    "bad",
    [{"channels": 2}, {"height": 0}, {"resize": "nearest"}, {"on_mismatch": "ignore"}],
)
def test_an_impossible_spec_is_refused(bad):
    """A specification that cannot be met is an error where it is written."""
    with pytest.raises(UsageError):
        ImageSpec(**{"height": 8, "width": 8, "channels": 1} | bad)


# --- headers and masks ------------------------------------------------------------------------


def test_headers_say_what_pixels_do_not(photo, grey, tmp_path):
    """Size, bits and kind of pixels as stored; every lossless codec is one."""
    sixteen = grey.astype(np.uint16) * 257
    for image, header in (
        (grey, Header(28, 28, "lossless", 8, "L")),
        (photo, Header(40, 30, "lossless", 8, "RGB")),
        (encoded(photo), Header(40, 30, "lossless", 8, "RGB")),
        (encoded(photo, "JPEG"), Header(40, 30, "JPEG", 8, "RGB")),
        (encoded(photo, "WEBP"), Header(40, 30, "WebP", 8, "RGB")),
        (encoded(photo, "WEBP", lossless=True), Header(40, 30, "lossless", 8, "RGB")),
        (encoded(photo, "TIFF", compression="jpeg"), Header(40, 30, "JPEG", 8, "RGB")),
        (encoded(photo, "TIFF"), Header(40, 30, "lossless", 8, "RGB")),
        (encoded(grey, "GIF"), Header(28, 28, "lossless", 8, "P")),
        (encoded(sixteen), Header(28, 28, "lossless", 16, "I;16")),
        (encoded(sixteen, "TIFF"), Header(28, 28, "lossless", 16, "I;16")),
        (encoded(grey > 99), Header(28, 28, "lossless", 1, "1")),
        (png(2, 1, 16, 2, b"\0" + bytes(12)), Header(2, 1, "lossless", 16, "RGB")),
    ):
        assert read_header(image) == header
    (tmp_path / "x").write_bytes(encoded(photo, "JPEG"))
    assert read_header(tmp_path / "x") == Header(40, 30, "JPEG", 8, "RGB")
    with pytest.raises(CorruptImage):
        read_header(encoded(photo)[:20])


@pytest.mark.parametrize("policy", ["refuse", "crop", "resize"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_mask_goes_the_way_of_its_image(policy, channels, tmp_path):
    """What the model sees bright is what the mask marks, whatever is done about the size."""
    size = (32, 16) if policy == "refuse" else (40, 16)
    blocks = np.random.default_rng(0).random((size[0] // 4, size[1] // 4)) < 0.4
    mask = blocks.repeat(4, axis=0).repeat(4, axis=1)
    spec = ImageSpec(8, 4, channels, on_mismatch=policy)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    seen = to_pixels(np.where(mask, np.uint8(255), np.uint8(0)), spec)[..., 0]
    found = to_mask(tmp_path / "mask.png", spec, (8, 4))
    certain = (seen < 64) | (seen > 192)  # 40 pixels on 8 leave no whole blocks
    np.testing.assert_array_equal(found[certain], seen[certain] > 127)
    assert certain.mean() >= (1.0 if policy != "resize" else 0.5)


def test_a_mask_of_its_maps_size_is_taken_as_it_is(tmp_path):
    """Any value but black marks: 0 and 1, 0 and 255, and what lies between."""
    marks = np.array([[0, 1, 255], [0, 0, 7]], np.uint8)
    Image.fromarray(marks).save(tmp_path / "mask.png")
    found = to_mask(tmp_path / "mask.png", GREY, (2, 3))
    assert found.tolist() == [[False, True, True], [False, False, True]]
    Image.fromarray(marks.repeat(5, axis=0)).save(tmp_path / "mask.png")
    with pytest.raises(WrongSize):
        to_mask(tmp_path / "mask.png", GREY, (28, 28))


# --- bad images -------------------------------------------------------------------------------


def gif_with_frame_beyond_its_screen() -> bytes:
    data = bytearray(encoded(np.zeros((4, 4), np.uint8), "GIF"))
    at = data.index(b",\0\0\0\0")
    data[at + 5 : at + 9] = struct.pack("<HH", 65535, 65535)
    return bytes(data)


def webp_of_canvas(side: int) -> bytes:
    size = (side - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + size + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def frames(kind: str) -> bytes:
    pictures = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 128, 255)]
    return encoded(pictures[0], kind, save_all=True, append_images=pictures[1:])


BAD = {
    "empty": (b"", EmptyImage),
    "text": (b"hello world, this is no image", FormatNotAllowed),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", FormatNotAllowed),
    "xml svg": (b"<?xml version='1.0'?><svg/>", FormatNotAllowed),
    "pdf": (b"%PDF-1.7\n", FormatNotAllowed),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", FormatNotAllowed),
    "html": (b"\n <html>", FormatNotAllowed),
    "icon": (b"\0\0\1\0\1\0" + b"\0" * 30, FormatNotAllowed),
    "heic": (b"\0\0\0\x18ftypheic" + b"\0" * 30, FormatNotAllowed),
    "one byte": (b"\x89", FormatNotAllowed),
    "float tiff": (encoded(np.zeros((4, 4), np.float32), "TIFF"), FormatNotAllowed),
    "int32 tiff": (encoded(np.zeros((4, 4), np.int32), "TIFF"), FormatNotAllowed),
    "lab tiff": (
        encoded(
            ImageCms.applyTransform(
                Image.new("RGB", (4, 4)),
                ImageCms.buildTransform(
                    ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
                ),
            ),
            "TIFF",
        ),
        FormatNotAllowed,
    ),
    "animated gif": (frames("GIF"), AnimatedImage),
    "animated webp": (frames("WEBP"), AnimatedImage),
    "apng": (frames("PNG"), AnimatedImage),
    "multi-page tiff": (frames("TIFF"), AnimatedImage),
    "png bomb": (png(60_000, 60_000, 8, 0, b""), TooManyPixels),
    "png of palette bomb": (png(60_000, 60_000, 8, 3, b""), TooManyPixels),
    "webp bomb": (webp_of_canvas(16_000), TooManyPixels),
    "gif bomb": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0), TooManyPixels),
    "gif frame bomb": (gif_with_frame_beyond_its_screen(), TooManyPixels),
    "bmp bomb": (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0),
        TooManyPixels,
    ),
    "pnm bomb": (b"P5 60000 60000 255\n", TooManyPixels),
    "jpeg bomb": (
        b"\xff\xd8\xff\xc0\0\x0b\x08" + struct.pack(">HH", 65000, 65000) + b"\1\1\x11\0",
        TooManyPixels,
    ),
    "png without pixels": (png(4, 4, 8, 0, b""), CorruptImage),
    "png of size 0": (png(0, 4, 8, 0, b""), CorruptImage),
    "png of unknown colour": (png(4, 4, 8, 5, bytes(20)), CorruptImage),
    "png with pixels missing": (png(4, 4, 8, 0, bytes(19)), CorruptImage),
    "png of unknown filter": (png(4, 1, 8, 0, b"\x09\0\0\0\0"), CorruptImage),
    "png without header": (b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), CorruptImage),
    "webp of nothing": (b"RIFF\4\0\0\0WEBP", CorruptImage),
    "bmp of text": (b"BMW is a car maker, not a bitmap", CorruptImage),
    "jpeg of nothing": (b"\xff\xd8\xff\xd9", CorruptImage),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_by_kind(name):
    """Each way an image can be bad has its error, of one line, and nothing is decoded."""
    data, error = BAD[name]
    with pytest.raises(error) as caught:
        to_pixels(data, GREY)
    assert type(caught.value) is error
    assert len(str(caught.value)) > 20
    assert "\n" not in str(caught.value)


def test_the_corpus_covers_every_reason():
    """The corpus, the byte budget and the sizes above leave no kind of error untested."""
    tested = {error for _, error in BAD.values()} | {TooManyBytes, WrongSize}
    assert tested == set(ImageError.__subclasses__())


SOUND = {
    "png grey": encoded(np.arange(600, dtype=np.uint8).reshape(20, 30)),
    "png colour": encoded(np.arange(1800, dtype=np.uint16).astype(np.uint8).reshape(20, 30, 3)),
    "png palette": encoded(
        Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).quantize(9)
    ),
    "jpeg": encoded(np.arange(600, dtype=np.uint8).reshape(20, 30), "JPEG"),
    "jpeg progressive": encoded(np.zeros((20, 30, 3), np.uint8), "JPEG", progressive=True),
    "webp": encoded(np.arange(600, dtype=np.uint8).reshape(20, 30), "WEBP"),
    "webp lossless": encoded(np.zeros((20, 30, 3), np.uint8), "WEBP", lossless=True),
    "gif": encoded(np.arange(200, dtype=np.uint8).reshape(10, 20), "GIF"),
    "bmp": encoded(np.arange(200, dtype=np.uint8).reshape(10, 20), "BMP"),
    "tiff": encoded(np.arange(200, dtype=np.uint8).reshape(10, 20), "TIFF"),
    "tiff 16": encoded(np.arange(200, dtype=np.uint16).reshape(10, 20), "TIFF"),
    "pgm": encoded(np.arange(200, dtype=np.uint8).reshape(10, 20), "PPM"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_file_cut_anywhere_is_refused(name):
    """Not one proper beginning of a sound file passes as the image."""
    data = SOUND[name]
    decode(data, 1, LIMITS)
    step = max(1, len(data) // 150)
    for length in {*range(0, len(data), step), len(data) - 1}:
        with pytest.raises(ImageError):
            decode(data[:length], 1, LIMITS)


@given(
    name=st.sampled_from(sorted(SOUND)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
)
def test_damaged_bytes_end_in_pixels_or_an_image_error(name, changes):
    """Whatever happens to a file, nothing else than an ImageError comes out."""
    data = bytearray(SOUND[name])
    for at, value in changes:
        data[at % len(data)] = value
    try:
        pixels = decode(bytes(data), 3, Limits(max_pixels=10_000))
    except ImageError:
        pass
    else:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3


@given(data=st.binary(max_size=64))
def test_arbitrary_bytes_are_an_image_error(data):
    """Noise behind any magic number is refused."""
    for magic in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"P5 ", b"BM"):
        with pytest.raises(ImageError):
            decode(magic + data, 1, Limits(max_pixels=1))


@pytest.mark.parametrize("chunk_kind", [b"IHDR", b"IDAT"])
def test_png_checksums_are_verified(chunk_kind, shirt):
    """One flipped bit in a chunk is found by its checksum."""
    data = bytearray(shirt)
    data[data.index(chunk_kind) + 9] ^= 1
    with pytest.raises(CorruptImage, match="checksum"):
        decode(bytes(data), 1, LIMITS)


def test_budgets_are_inclusive(shirt, tmp_path):
    """An image of just the budget passes, one byte or one pixel more does not."""
    path = tmp_path / "image"
    path.write_bytes(shirt)
    to_pixels(path, GREY, Limits(max_bytes=len(shirt), max_pixels=784))
    with pytest.raises(TooManyBytes, match=f"{len(shirt)} bytes; at most {len(shirt) - 1}"):
        to_pixels(path, GREY, Limits(max_bytes=len(shirt) - 1))
    with pytest.raises(TooManyBytes):
        to_pixels(shirt, GREY, Limits(max_bytes=len(shirt) - 1))
    with pytest.raises(TooManyPixels, match="28x28 pixels; at most 783"):
        to_pixels(shirt, GREY, Limits(max_pixels=783))


def test_a_budget_above_pillows_own_limit_holds(monkeypatch):
    """The budget is ours: Pillow's warning about large images neither replaces nor precedes it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    pixels = np.zeros((12, 12), np.uint8)  # more than the limit, less than twice
    for kind in ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP"):
        assert decode(encoded(pixels, kind), 1, LIMITS).shape == (12, 12, 1)


@pytest.mark.parametrize(
    ("pixels", "error"),
    [
        (np.zeros((28, 28), np.float32), WrongSize),
        (np.zeros((28, 28), bool), WrongSize),
        (np.zeros((28, 28), np.uint16), WrongSize),
        (np.zeros((28, 28, 4), np.uint8), WrongSize),
        (np.zeros((1, 28, 28, 1), np.uint8), WrongSize),
        (np.zeros(784, np.uint8), WrongSize),
        (np.zeros((0, 28), np.uint8), EmptyImage),
        (np.zeros((9000, 9000), np.uint8), TooManyPixels),
    ],
)
def test_arrays_of_another_kind_are_refused(pixels, error):
    """Only uint8 pictures are read: the range of anything else would be a guess."""
    with pytest.raises(error):
        to_pixels(pixels, GREY)


def test_a_path_that_cannot_be_read_is_an_image_error(tmp_path):
    """A missing file, a folder and a pipe end alike, and none is waited for."""
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing.png", tmp_path, tmp_path / "pipe"):
        with pytest.raises(CorruptImage):
            to_pixels(path, GREY)


# --- hashes, threads, the fixture -------------------------------------------------------------


@given(pixels=arrays(np.uint8, (4, 6, 1)))
def test_content_hash_depends_on_pixels_and_shape_alone(pixels):
    """Equal pixels hash equally whatever their memory layout; another shape does not."""
    number = content_hash(pixels)
    assert 0 <= number < 1 << 64
    assert content_hash(np.asfortranarray(pixels)) == number
    assert content_hash(pixels.reshape(6, 4, 1)) != number
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    assert content_hash(changed) != number


def test_content_hash_is_fixed():
    """Bundles store hashes: the function may never change."""
    assert content_hash(np.zeros((28, 28, 1), np.uint8)) == 14921574541443640214


def test_threads_do_not_disturb_each_other(grey, photo):
    """Four threads that decode different images each get their own."""
    wrong = []

    def work(image):
        data, channels = encoded(image), 3 if image.ndim == 3 else 1
        for _ in range(100):
            if not np.array_equal(decode(data, channels, LIMITS).squeeze(), image):
                wrong.append(image)

    threads = [
        threading.Thread(target=work, args=(x,)) for x in (grey, photo, 255 - grey, photo[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_webp_is_built_in():
    """The decoder of WebP comes with the wheel."""
    assert features.check("webp")
