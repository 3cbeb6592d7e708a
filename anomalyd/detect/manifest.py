"""`manifest.json`: what a bundle says about itself, checked field by field."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NoReturn, TypedDict

import msgspec
import numpy as np

from anomalyd.detect.statistics import BY_CLASS, BY_CODE
from anomalyd.errors import AnomalydError, BundleError
from anomalyd.images import ImageSpec

__all__ = [
    "FORMAT_VERSION",
    "OUTPUTS",
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
OUTPUTS = {
    "density": ("log_likelihood", "statistics"),
    "classifier": ("log_posterior", "statistics", "embedding"),
    "autoencoder": ("embedding", "statistics"),
}
"""Kind -> the outputs that its graph must have, the one that golden.npz holds it to first."""
FOREIGN = {
    "density": ("log_posterior",),
    "classifier": ("log_likelihood", "nll_map", "excess_map"),
    "autoencoder": ("log_likelihood", "log_posterior", "nll_map", "excess_map"),
}
"""Kind -> the outputs that its graph must not have: they would say what it does not know."""

# One component of a path, safe in a URL, a metric label and a terminal alike.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_WORD = re.compile(r"[a-z][a-z0-9_]{0,63}")
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
        kind: what the graph computes; a density is what verdicts need, the others embed.
        created: time of writing, ISO 8601 in UTC.
        image: the images the graph takes and how others are fitted to it.
        likelihood: "exact", or the lower bound it is: "elbo" or "iwae-K"; "none" where the
            kind is no density.
        score_name: which score the verdict rests on; "none" likewise.
        guarantee: what the p-values of calibration.npz promise.
        classes: names of the K classes, None for a model without classes.
        priors: probabilities of the classes, summing to 1.
        outputs: outputs of model.onnx with their units.
        statistics: names of the S columns of the output `statistics`.
        default_alpha: false-alarm rate used when none is asked for, in (0, 1).
        opset: ONNX operator set of model.onnx.
        parameters: number of trained parameters.
        bits_per_dim: mean bits per dimension of a split, None where not measured.
        tolerance: bits/dim that scores may differ by, per execution provider.
        calibration_n: number of calibration images; 0 where the kind is no density.
        files: SHA-256 and size of every other file; filled in by `write_bundle`.
        data_digest: identifies the training data.
        licence: licence of the weights, and of the data where it matters.
        temperature: of the posterior by Bayes' rule, above 0; None, and no key, where verdicts
            have no labels.
        doubt: what a score in a class grows by for each nat that another is likelier by, at least
            0; no key for 0.
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
    temperature: float | None = None
    doubt: float = 0.0


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
    plain = msgspec.to_builtins(manifest, enc_hook=_number)
    for key, default in (("temperature", None), ("doubt", 0.0)):
        if getattr(manifest, key) == default:
            plain.pop(key, None)
    text = json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _number(value: Any) -> Any:
    """NumPy's numbers as Python's; whoever measured a rate need not convert it."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a manifest cannot hold a {type(value).__name__}")


def check_manifest(manifest: Manifest) -> None:
    """Refuse values that have the right type and the wrong content.

    Raises:
        BundleError: naming the key, the rule and the value.
    """
    for key, value, holds, rule in _rules(manifest):
        if not holds:
            raise BundleError(f"manifest.json: {key} must be {rule}, not {reprlib.repr(value)}")


def _rules(m: Manifest) -> Iterator[tuple[str, Any, bool, str]]:
    yield "name", m.name, _matches(_NAME, m.name), f"like {_NAME.pattern}"
    yield "version", m.version, _matches(_NAME, m.version), f"like {_NAME.pattern}"
    yield "created", m.created, _is_utc(m.created), "an ISO 8601 time in UTC"
    height, width, levels = m.image.height, m.image.width, m.image.levels
    yield "image.height", height, 1 <= height <= MAX_SIDE, f"from 1 to {MAX_SIDE}"
    yield "image.width", width, 1 <= width <= MAX_SIDE, f"from 1 to {MAX_SIDE}"
    yield "image.levels", levels, 2 <= levels <= 256, "from 2 to 256"
    confidence = m.guarantee["confidence"]
    if m.guarantee["kind"] == "marginal":
        yield "guarantee.confidence", confidence, confidence is None, "null for marginal"
    else:
        inside = confidence is not None and 0 < confidence < 1
        yield "guarantee.confidence", confidence, inside, "within (0, 1) for conditional"
    for key, names in (("statistics", m.statistics), ("outputs", list(m.outputs))):
        fine = all(_matches(_WORD, name) for name in names) and _are_different(names)
        yield key, names, fine, f"different names like {_WORD.pattern}"
    needed = OUTPUTS[m.kind]
    yield "outputs", list(m.outputs), m.outputs.keys() >= {*needed}, f"at least {_listed(needed)}"
    foreign = [name for name in FOREIGN[m.kind] if name in m.outputs]
    yield "outputs", list(m.outputs), not foreign, f"without {foreign} where kind is {m.kind}"
    classes, priors = m.classes, m.priors
    if classes is not None:
        fine = len(classes) > 0 and all(classes) and _are_different(classes)
        yield "classes", classes, fine, "different names, none empty"
    if priors is not None:
        fine = len(priors) == len(classes or ()) and all(p > 0 for p in priors)
        yield "priors", priors, fine, "positive, one per class"
        yield "priors", priors, math.isclose(sum(priors), 1, abs_tol=1e-6), "of sum 1"
    yield "default_alpha", m.default_alpha, 0 < m.default_alpha < 1, "within (0, 1)"
    yield "opset", m.opset, m.opset >= 1, "at least 1"
    yield "parameters", m.parameters, m.parameters >= 0, "at least 0"
    for split, bits in m.bits_per_dim.items():
        yield f"bits_per_dim.{split}", bits, bits is None or math.isfinite(bits), "finite or null"
    for provider, bits in m.tolerance.items():
        yield f"tolerance.{provider}", bits, 0 <= bits <= 1, "from 0 to 1 bits/dim"
    yield from _density_rules(m) if m.kind == "density" else _other_rules(m)


def _density_rules(m: Manifest) -> Iterator[tuple[str, Any, bool, str]]:
    likelihood, score = m.likelihood, m.score_name
    yield "likelihood", likelihood, _matches(_LIKELIHOOD, likelihood), "exact, elbo or iwae-K"
    fine = _matches(_WORD, score) and score != "none"
    yield "score_name", score, fine, f"like {_WORD.pattern} and not none"
    fine = (score == "texture") == m.image.tiled
    yield "score_name", score, fine, "texture where on_mismatch is tile, and nowhere else"
    if m.image.tiled:
        maps = ("nll_map", "excess_map")
        yield "outputs", list(m.outputs), m.outputs.keys() >= {*maps}, f"at least {_listed(maps)}"
    yield "calibration_n", m.calibration_n, m.calibration_n >= 1, "at least 1"
    if score == BY_CODE:
        yield "outputs", list(m.outputs), "embedding" in m.outputs, f"with embedding for {score}"
    if score == BY_CLASS:
        yield "classes", m.classes, len(m.classes or ()) > 1, f"two or more for {BY_CLASS}"
        yield "priors", m.priors, m.priors is not None, f"given for {BY_CLASS}"
        fine = m.temperature is not None and 0 < m.temperature < math.inf
        yield "temperature", m.temperature, fine, f"above 0 for {BY_CLASS}"
        yield "doubt", m.doubt, 0 <= m.doubt < math.inf, "at least 0"
    else:
        yield "temperature", m.temperature, m.temperature is None, f"absent without {BY_CLASS}"
        yield "doubt", m.doubt, m.doubt == 0, f"absent without {BY_CLASS}"


def _other_rules(m: Manifest) -> Iterator[tuple[str, Any, bool, str]]:
    """What has no density has no likelihood, no score and nothing to promise."""
    where = f"where kind is {m.kind}"
    yield "likelihood", m.likelihood, m.likelihood == "none", f"none {where}"
    yield "score_name", m.score_name, m.score_name == "none", f"none {where}"
    yield "calibration_n", m.calibration_n, m.calibration_n == 0, f"0 {where}"
    yield "temperature", m.temperature, m.temperature is None, f"absent {where}"
    yield "doubt", m.doubt, m.doubt == 0, f"absent {where}"
    promise = m.guarantee["kind"]
    yield "guarantee.kind", promise, promise == "marginal", f"marginal {where}"
    for split, bits in m.bits_per_dim.items():
        yield f"bits_per_dim.{split}", bits, bits is None, f"null {where}"
    if m.kind == "classifier":
        yield "classes", m.classes, m.classes is not None, f"the names of the classes {where}"
    else:
        yield "classes", m.classes, m.classes is None, f"null {where}"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _matches(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.fullmatch(text) is not None


def _is_utc(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False


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
    for text in keys + [text for _, value in pairs for text in _texts(value)]:
        # What a terminal would obey instead of show never gets as far as `bundle inspect`.
        if not text.isprintable():
            raise ValueError(f"unprintable character in {reprlib.repr(text)}")
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {reprlib.repr(twice)}")
    return dict(pairs)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]


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
