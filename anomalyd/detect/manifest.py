"""`manifest.json`: what a bundle says about itself, checked field by field."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NoReturn, TypedDict

import msgspec

from anomalyd.errors import AnomalydError, BundleError
from anomalyd.images import ImageSpec

__all__ = [
    "FORMAT_VERSION",
    "FileEntry",
    "Guarantee",
    "Manifest",
    "Output",
    "check_manifest",
    "dump_manifest",
    "parse_manifest",
]

FORMAT_VERSION = 1
MAX_SIDE = 65_535

# One component of a path, safe in a URL, a metric label and a terminal alike.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,63}")
_LIKELIHOOD = re.compile(r"exact|elbo|iwae-[1-9][0-9]{0,5}")


class Output(TypedDict):
    """One output of model.onnx."""

    unit: str


class FileEntry(TypedDict):
    """One file of the folder."""

    sha256: str
    bytes: int


class Guarantee(TypedDict):
    """What the p-values promise; `confidence` is a number for "conditional" only."""

    kind: Literal["marginal", "conditional"]
    confidence: float | None


@dataclass(frozen=True)
class Manifest:
    """The keys of `manifest.json`; docs/bundle.md states each one's meaning and limits.

    Attributes:
        format_version: version of the format, 1.
        name: what URLs, metrics and output call the model.
        version: version of this model, free within the characters of `name`.
        created: time of writing, ISO 8601 in UTC.
        image: the images the graph takes and how others are fitted to it.
        likelihood: "exact", or the lower bound it is: "elbo" or "iwae-K".
        score_name: which score the verdict rests on.
        guarantee: what the p-values of calibration.npz promise.
        classes: names of the K classes, None for one density without classes.
        priors: probabilities of the classes, summing to 1.
        outputs: outputs of model.onnx with their units.
        statistics: names of the S columns of the output `statistics`.
        default_alpha: false-alarm rate used when none is asked for, in (0, 1).
        opset: ONNX operator set of model.onnx.
        parameters: number of trained parameters.
        bits_per_dim: mean bits per dimension of a split, None where not measured.
        tolerance: bits/dim that scores may differ by, per execution provider.
        calibration_n: number of calibration images.
        files: SHA-256 and size of every other file; filled in by `write_bundle`.
        data_digest: identifies the training data.
        licence: licence of the weights, and of the data where it matters.
    """

    format_version: int
    name: str
    version: str
    kind: Literal["density", "classifier", "autoencoder"]
    created: str
    image: ImageSpec
    likelihood: str
    score_name: str
    guarantee: Guarantee
    classes: list[str] | None
    priors: list[float] | None
    outputs: dict[str, Output]
    statistics: list[str]
    default_alpha: float
    opset: int
    parameters: int
    bits_per_dim: dict[str, float | None]
    tolerance: dict[str, float]
    calibration_n: int
    files: dict[str, FileEntry]
    data_digest: str
    licence: str


def parse_manifest(data: bytes) -> Manifest:
    """Manifest in the bytes of `manifest.json`.

    Raises:
        BundleError: not strict JSON, of a newer format, or a key that is missing, unknown, of
            the wrong type or out of range.
    """
    raw = _strict_json(data)
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise BundleError(
            "manifest.json: format_version must be a whole number from 1, "
            f"not {reprlib.repr(version)}"
        )
    if version > FORMAT_VERSION:
        raise BundleError(
            f"manifest.json: format_version {version} is newer than {FORMAT_VERSION}, the newest "
            "that this anomalyd reads; upgrade anomalyd"
        )
    known = {key: value for key, value in raw.items() if not key.startswith("x-")}
    try:
        manifest = msgspec.convert(known, Manifest)
    except (msgspec.ValidationError, AnomalydError) as error:
        raise BundleError(f"manifest.json: {error}") from None
    _refuse_unknown(known, msgspec.to_builtins(manifest), "$")
    check_manifest(manifest)
    return manifest


def dump_manifest(manifest: Manifest) -> bytes:
    """Bytes of `manifest.json`: UTF-8, sorted keys, two spaces, final newline."""
    plain = msgspec.to_builtins(manifest)
    text = json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def check_manifest(manifest: Manifest) -> None:
    """Refuse values that have the right type and the wrong content.

    Raises:
        BundleError: naming the key, the rule and the value.
    """
    for where, rule, value, holds in _rules(manifest):
        if not holds:
            raise BundleError(f"manifest.json: {where} must be {rule}, not {reprlib.repr(value)}")


def _rules(m: Manifest) -> Iterator[tuple[str, str, Any, bool]]:
    image = m.image
    yield "name", f"like {_NAME.pattern}", m.name, bool(_NAME.fullmatch(m.name))
    yield "version", f"like {_NAME.pattern}", m.version, bool(_NAME.fullmatch(m.version))
    yield "created", "an ISO 8601 time in UTC", m.created, _is_utc(m.created)
    for side in ("height", "width"):
        value = getattr(image, side)
        yield f"image.{side}", f"from 1 to {MAX_SIDE}", value, 1 <= value <= MAX_SIDE
    yield "image.channels", "1 or 3", image.channels, image.channels in (1, 3)
    yield "image.levels", "from 2 to 256", image.levels, 2 <= image.levels <= 256
    yield "image.resize", "area or lanczos", image.resize, image.resize in ("area", "lanczos")
    policies = ("refuse", "crop", "resize")
    yield (
        "image.on_mismatch",
        " or ".join(policies),
        image.on_mismatch,
        (image.on_mismatch in policies),
    )
    yield (
        "likelihood",
        "exact, elbo or iwae-K",
        m.likelihood,
        (_LIKELIHOOD.fullmatch(m.likelihood) is not None),
    )
    yield "score_name", f"like {_IDENTIFIER.pattern}", m.score_name, _is_identifier(m.score_name)
    confidence = m.guarantee["confidence"]
    if m.guarantee["kind"] == "marginal":
        yield "guarantee.confidence", "null for marginal", confidence, confidence is None
    else:
        yield (
            "guarantee.confidence",
            "within (0, 1) for conditional",
            confidence,
            (confidence is not None and 0 < confidence < 1),
        )
    yield (
        "statistics",
        f"different names like {_IDENTIFIER.pattern}",
        m.statistics,
        (_are_different(m.statistics) and all(map(_is_identifier, m.statistics))),
    )
    yield (
        "outputs",
        f"names like {_IDENTIFIER.pattern}",
        list(m.outputs),
        (all(map(_is_identifier, m.outputs))),
    )
    for required in ("log_likelihood", "statistics"):
        yield "outputs", f"a table with {required}", list(m.outputs), required in m.outputs
    if m.classes is not None:
        yield (
            "classes",
            "different, non-empty names",
            m.classes,
            (bool(m.classes) and all(m.classes) and _are_different(m.classes)),
        )
    if m.priors is not None:
        yield (
            "priors",
            "positive, one per class, with sum 1",
            m.priors,
            (
                len(m.priors) == len(m.classes or ())
                and all(0 < p <= 1 for p in m.priors)
                and math.isclose(sum(m.priors), 1.0, abs_tol=1e-6)
            ),
        )
    yield "default_alpha", "within (0, 1)", m.default_alpha, 0 < m.default_alpha < 1
    yield "opset", "at least 1", m.opset, m.opset >= 1
    yield "parameters", "at least 0", m.parameters, m.parameters >= 0
    yield "calibration_n", "at least 1", m.calibration_n, m.calibration_n >= 1
    for split, bits in m.bits_per_dim.items():
        yield f"bits_per_dim.{split}", "a finite number", bits, bits is None or math.isfinite(bits)
    for provider, bits in m.tolerance.items():
        yield f"tolerance.{provider}", "from 0 to 1 bits/dim", bits, 0 <= bits <= 1


def _is_utc(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False


def _is_identifier(text: str) -> bool:
    return _IDENTIFIER.fullmatch(text) is not None


def _are_different(names: list[str]) -> bool:
    return len(set(names)) == len(names)


def _strict_json(data: bytes) -> dict[str, Any]:
    """JSON object without what JSON parsers disagree on: duplicate keys, NaN, Infinity."""
    try:
        raw = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise BundleError("manifest.json: nested too deeply; copy the bundle again") from None
    except ValueError as error:  # bad UTF-8 and bad JSON are ValueErrors, too
        raise BundleError(f"manifest.json: not strict JSON in UTF-8: {error}") from None
    if not isinstance(raw, dict):
        raise BundleError(f"manifest.json: must hold one object, not {reprlib.repr(raw)}")
    return raw


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for text in keys + [value for _, value in pairs if isinstance(value, str)]:
        # What a terminal would obey instead of show never gets as far as `bundle inspect`.
        if not text.isprintable():
            raise ValueError(f"unprintable character in {reprlib.repr(text)}")
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {reprlib.repr(twice)}")
    return dict(pairs)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond a double")
    return value


def _refuse_unknown(raw: Any, known: Any, where: str) -> None:
    """Refuse keys that the conversion did not use; a typo must not pass for a default."""
    if not isinstance(raw, dict):
        return
    for key, value in raw.items():
        if key not in known:
            raise BundleError(
                f"manifest.json: unknown key {reprlib.repr(key)} at {where}; "
                'private keys start with "x-" and stand at the top'
            )
        _refuse_unknown(value, known[key], f"{where}.{key}")
