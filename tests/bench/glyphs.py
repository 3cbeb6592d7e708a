"""Images of letters and symbols, rendered from fonts that Debian packages.

A set is a few fonts and the characters to draw with them. Each image is one character in one of
the fonts, white on black, at random in size, place and slant; two renderings:

    centred    as MNIST is made: anti-aliased in a box of 20x20, its centre of mass in the middle
    large      filling the 28x28

The same seed gives the same images wherever fonts and FreeType are the same. Characters that look
like digits are left out everywhere, so that no "outlier" is a digit.

    python tests/bench/glyphs.py        the packages, for apt-get install; `make fonts` does it
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["GLYPHS", "Glyphs", "draw", "missing"]

FONTS = Path("/usr/share/fonts")
SIDE = 28
EM = 96  # pixels at which a character is drawn before it is scaled down
NOWHERE = "\U0010ffff"  # in no font: drawn, it is the box that stands for a missing character
CENTRED, LARGE = (19, 20), (25, 28)  # pixels of the longer side
SLANT = 8.0  # degrees, a standard deviation
STROKE = (2.0, 3.4)  # pixels, as the pens of MNIST are


@dataclass(frozen=True)
class Glyphs:
    """Where one set comes from.

    Attributes:
        package: the Debian packages that have the fonts, separated by spaces.
        fonts: patterns below /usr/share/fonts.
        characters: what is drawn: characters, and ranges of code points.
        pen: whether strokes are brought to the width of MNIST's.
        unseen: whether no score may be chosen by it.
    """

    package: str
    fonts: tuple[str, ...]
    characters: tuple[str | range, ...]
    pen: bool = False
    unseen: bool = True


LATIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What a reader of digits could take for one, in any of the scripts.
DIGIT_LIKE = frozenset(
    "IlijJOoDQSsZzBbGgqTtyYL"  # Latin
    "ΟοΙιΘθσςΖ"  # Greek
    "ОоЗзбЧІіЈјЅѕ"  # Cyrillic
    "וןזסי"  # Hebrew
    "اهةى"  # Arabic
    "ঌ"  # Bengali
    "ธร"  # Thai
    "ვიპკნბ"  # Georgian
    "ՕօՑցՏջշլՁձ"  # Armenian
    "ᏮᏃᎥᏞᏚᎾᎤᏏᎶᏎᏭᏕᏯᏳᏀ"  # Cherokee
    "ᛁᛧᛐᛚᛙᛌᛍᛜ"  # Runic
    "〇一口丨丿亅囗ロノヘしつろるらうてフ"  # Han and kana
    "○◯●⚪⚫⬤❍❘❙❚▮▯∘∙∣∥∕∖⫿"  # symbols
)
NOTO = "fonts-noto-core"


def _noto(script: str, *characters: range, kinds: tuple[str, ...] = ("Sans", "Serif")) -> Glyphs:
    fonts = tuple(f"truetype/noto/Noto{kind}{script}-*.ttf" for kind in kinds)
    return Glyphs(NOTO, fonts, characters)


GLYPHS = {
    "latin-sans": Glyphs(
        "fonts-liberation",
        ("truetype/liberation/LiberationSans*.ttf",),
        (LATIN,),
        unseen=False,
    ),
    "latin-serif": Glyphs(
        "fonts-dejavu-core fonts-dejavu-extra",
        ("truetype/dejavu/DejaVuSerif*.ttf",),
        (LATIN,),
        unseen=False,
    ),
    "handwriting": Glyphs(
        "fonts-breip fonts-rufscript fonts-dkg-handwriting",
        (
            "truetype/breip/Breip.ttf",
            "truetype/rufscript/*.ttf",
            "truetype/fifthhorseman/*.ttf",
        ),
        (LATIN.replace("a", ""),),  # dkg's is an arrow
        pen=True,
        unseen=False,
    ),
    "symbols": Glyphs(
        "fonts-dejavu-core",
        ("truetype/dejavu/DejaVuSans.ttf",),
        (
            range(0x2190, 0x2200),
            range(0x2300, 0x239B),
            range(0x25A0, 0x2776),
            range(0x2794, 0x27C0),
        ),
        unseen=False,
    ),
    "handwriting-2": Glyphs(
        "fonts-sjfonts fonts-bwht fonts-humor-sans fonts-kristi",
        (
            "truetype/sjfonts/*.ttf",
            "opentype/bwht/*.otf",
            "truetype/humor-sans/*.ttf",
            "truetype/kristi/*.ttf",
        ),
        (LATIN,),
        pen=True,
    ),
    "latin-mono": Glyphs(
        "fonts-liberation", ("truetype/liberation/LiberationMono-*.ttf",), (LATIN,)
    ),
    "greek": _noto("", range(0x391, 0x3A2), range(0x3A3, 0x3AA), range(0x3B1, 0x3CA)),
    "cyrillic": _noto("", range(0x410, 0x450), range(0x452, 0x460)),
    "hebrew": _noto("Hebrew", range(0x5D0, 0x5EB)),
    "arabic": _noto(
        "Arabic", range(0x620, 0x63B), range(0x641, 0x64B), kinds=("Sans", "Naskh", "Kufi")
    ),
    "devanagari": _noto("Devanagari", range(0x905, 0x93A)),
    "bengali": _noto("Bengali", range(0x985, 0x9BA)),
    "tamil": _noto("Tamil", range(0xB85, 0xBBA)),
    "thai": _noto("Thai", range(0xE01, 0xE2F)),
    "georgian": _noto("Georgian", range(0x10D0, 0x10F1)),
    "armenian": _noto("Armenian", range(0x531, 0x557), range(0x561, 0x587)),
    "ethiopic": _noto("Ethiopic", range(0x1200, 0x135B)),
    "cherokee": _noto("Cherokee", range(0x13A0, 0x13F5), kinds=("Sans",)),
    "runic": _noto("Runic", range(0x16A0, 0x16EB), kinds=("Sans",)),
    "hieroglyphs": _noto("EgyptianHieroglyphs", range(0x13000, 0x1342F), kinds=("Sans",)),
    "cuneiform": _noto("Cuneiform", range(0x12000, 0x1236F), kinds=("Sans",)),
    "hangul": Glyphs("fonts-alee", ("truetype/alee/*.ttf",), (range(0xAC00, 0xD7A4),)),
    "kana": Glyphs(
        "fonts-wqy-microhei",
        ("truetype/wqy/wqy-microhei.ttc",),
        (range(0x3042, 0x3094), range(0x30A2, 0x30F4)),
    ),
    "han": Glyphs(
        "fonts-wqy-microhei", ("truetype/wqy/wqy-microhei.ttc",), (range(0x4E00, 0x9FA6),)
    ),
    "maths": Glyphs(
        "fonts-noto-core fonts-dejavu-extra",
        ("truetype/noto/NotoSansMath-*.ttf", "truetype/dejavu/DejaVuMathTeXGyre.ttf"),
        (range(0x2200, 0x2300), range(0x2A00, 0x2B00)),
    ),
    "icons": Glyphs(
        "fonts-font-awesome fonts-glyphicons-halflings fonts-entypo",
        (
            "truetype/font-awesome/*.ttf",
            "truetype/glyphicons/*.ttf",
            "truetype/fonts-entypo/*.ttf",
        ),
        (range(0xE001, 0xE261), range(0xE700, 0xE800), range(0xF000, 0xF2E1)),
    ),
    "pictograms": Glyphs(
        "fonts-symbola",
        ("truetype/ancient-scripts/Symbola_hint.ttf",),
        (range(0x1F300, 0x1F650), range(0x1F680, 0x1F6D0)),
    ),
}
"""Name of set -> where it comes from."""


def missing(names: Iterable[str]) -> list[str]:
    """The packages that still have to be installed for sets of these names, sorted."""
    return sorted(
        {
            package
            for name in names
            if not all(any(FONTS.glob(pattern)) for pattern in GLYPHS[name].fonts)
            for package in GLYPHS[name].package.split()
        }
    )


def draw(name: str, n: int, rng: np.random.Generator, *, large: bool) -> NDArray[np.uint8]:
    """Images of a set: uint8 (n, 28, 28), 0 the ground and 255 the ink.

    Args:
        name: a key of `GLYPHS`.
        n: how many.
        rng: draws font, character, size, slant and place of each.
        large: which rendering.

    Raises:
        OSError: fonts are missing, naming the packages.
    """
    if packages := missing([name]):
        raise FileNotFoundError(
            f"glyph set {name}: its fonts are not installed; as root, `apt-get install "
            f"{' '.join(packages)}`, or `make fonts` for those of all sets"
        )
    glyphs = GLYPHS[name]
    fonts = sorted(path for pattern in glyphs.fonts for path in FONTS.glob(pattern))
    characters = [
        character
        for part in glyphs.characters
        for character in (part if isinstance(part, str) else map(chr, part))
        if character not in DIGIT_LIKE
    ]
    images = np.zeros((n, SIDE, SIDE), np.uint8)
    for image in images:
        ink = None
        while ink is None:  # until a character that the font has
            font = _open(fonts[rng.integers(len(fonts))])
            ink = _ink(font, characters[rng.integers(len(characters))], rng, pen=glyphs.pen)
        _place(image, ink, rng, large=large)
    return images


@cache
def _open(path: Path) -> ImageFont.FreeTypeFont:
    # The basic layout is the same in every build of Pillow; single characters need no shaping.
    return ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.BASIC)


@cache
def _missing(font: ImageFont.FreeTypeFont) -> bytes:
    return bytes(font.getmask(NOWHERE))


def _ink(
    font: ImageFont.FreeTypeFont, character: str, rng: np.random.Generator, *, pen: bool
) -> Image.Image | None:
    """The character cut out at a random slant; None where the font does not have it."""
    mask = font.getmask(character)
    if not mask.getbbox() or bytes(mask) == _missing(font):
        return None
    stroke = 0.0
    if pen:
        wanted = rng.uniform(*STROKE) * max(mask.size) / CENTRED[1]
        stroke = max(0.0, (wanted - _thickness(mask)) / 2)
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    image = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), character, 255, font, stroke_width=stroke)
    image = image.rotate(SLANT * rng.standard_normal(), Image.Resampling.BICUBIC, expand=True)
    return image.crop(image.getbbox())


def _thickness(mask: Image.core.ImagingCore) -> float:
    """Width of a stroke, pixels: twice the area over the outline's length."""
    ink = np.pad(np.array(mask, np.float64).reshape(mask.size[::-1]) / 255, 1)
    outline = np.hypot(*np.gradient(ink)).sum()
    return float(2 * ink.sum() / outline)


def _place(
    image: NDArray[np.uint8], ink: Image.Image, rng: np.random.Generator, *, large: bool
) -> None:
    """Scale the ink down and put it into the image."""
    scale = rng.uniform(*(LARGE if large else CENTRED)) / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    small = np.asarray(ink.resize((width, height), Image.Resampling.BOX))
    room = np.array([SIDE - height, SIDE - width])
    if large:
        top, left = rng.integers(room + 1)
    else:
        mass = np.indices(small.shape) * small.astype(np.float64) / small.sum(dtype=np.float64)
        middle = mass.sum(axis=(1, 2)) + 0.5
        top, left = np.clip(np.rint(SIDE / 2 - middle).astype(int), 0, room)
    image[top : top + height, left : left + width] = small


if __name__ == "__main__":
    print(*sorted({package for glyphs in GLYPHS.values() for package in glyphs.package.split()}))
