"""The Open Inference Protocol, version 2: tensors in, tensors out, whatever carries them.

    inputs    image    BYTES  [N]           encoded images (in JSON: base64)
              pixels   UINT8  [N, H, W, C]  or decoded ones
    outputs   score, bits_per_dim, p_value  FP64 [N];  outlier  BOOL [N]
              label, reason  BYTES [N], empty where there is none;  posterior  FP64 [N, K]
              heatmap  FP32 [N, H, W], nats a pixel, only where it is asked for

Reference: https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from anomalyd.serve.problems import Problem
from anomalyd.serve.scoring import Asked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.serve.models import Model, Scored
    from anomalyd.serve.scoring import Image, Pixels

__all__ = [
    "EXTENSIONS",
    "Call",
    "Output",
    "bad",
    "check_elements",
    "check_maps",
    "config",
    "elements",
    "images_of",
    "metadata",
    "outputs_of",
    "packed",
    "parse_json",
    "prepare",
    "switch",
]

EXTENSIONS = ("binary_tensor_data", "model_repository", "model_configuration", "statistics")
PLATFORM = "onnx_onnxv1"
MOST_SIDES = 8
# A list of numbers in JSON takes the event loop as long as all its requests: so many, no more.
MOST_ELEMENTS = 1 << 20
Parameter = bool | int | float | str
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
# The pixels may be nested like their shape, or flat.
NESTED: dict[int, Any] = {1: list[Byte], 4: list[list[list[list[Byte]]]]}
OPENING = re.compile(rb"[\s\[]*")
# Every sequence, priority and trace parameter of other servers is accepted and means nothing here.
ALPHA, HEATMAP, TIMEOUT = "alpha", "heatmap", "timeout"
LABEL_ALPHA, REJECT_COST = "label_alpha", "reject_cost"
CLASSES = ("label", "posterior", "reason")
LARGEST = float(np.finfo(np.float32).max)


class Tensor(msgspec.Struct):
    """One input."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Parameter] | None = None
    data: msgspec.Raw = msgspec.Raw(b"")  # empty where the bytes come apart from the JSON


class Wanted(msgspec.Struct):
    """One output that is asked for."""

    name: str
    parameters: dict[str, Parameter] | None = None


class Call(msgspec.Struct):
    """An inference request."""

    inputs: list[Tensor]
    id: str | None = None
    parameters: dict[str, Parameter] | None = None
    outputs: list[Wanted] | None = None


@dataclass(frozen=True, eq=False)
class Output:
    """One output: numbers of its shape, or N byte strings."""

    name: str
    datatype: str
    shape: list[int]
    values: NDArray[Any] | list[bytes]


_decoder = msgspec.json.Decoder(Call)


def bad(detail: str) -> Problem:
    """The refusal of a request that is malformed."""
    return Problem(400, "request", detail)


def parse_json(head: bytes | memoryview) -> Call:
    """The JSON of an inference request.

    Raises:
        Problem: 400 not JSON, or not of the protocol's shape, 413 more elements than are read.
    """
    text = bytes(head)
    check_elements(text.count(b",") + text.count(b"["))
    call: Call = _strict(_decoder.decode, text, "the request")
    return call


def metadata(model: Model, versions: Sequence[str]) -> dict[str, Any]:
    """Model metadata: what goes in and what comes out."""
    inputs = [("image", "BYTES", []), ("pixels", "UINT8", _sides(model))]
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": [_described(name, kind, [-1, *sides]) for name, kind, sides in inputs],
        "outputs": [_described(name, kind, [-1, *sides]) for name, kind, sides in _there(model)],
    }


def config(model: Model, max_images: int) -> dict[str, Any]:
    """Model configuration as Triton's clients read it: of the inputs either will do."""
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": max_images,
        "input": [
            {"name": "image", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
            {
                "name": "pixels",
                "data_type": "TYPE_UINT8",
                "dims": _sides(model),
                "optional": True,
            },
        ],
        "output": [
            {"name": name, "data_type": _triton_type(kind), "dims": sides or [1]}
            for name, kind, sides in _there(model)
        ],
    }


def images_of(tensor: Tensor, raw: memoryview | None, most: int) -> Sequence[Image]:
    """The images of the one input.

    Args:
        tensor: the input.
        raw: its bytes where they came apart from the JSON.
        most: images allowed.

    Raises:
        Problem: 400 a name, type, shape or size that does not fit, 413 too many images.
    """
    count = _checked_shape(tensor, most)
    if (raw is None) == (memoryview(tensor.data).nbytes == 0):
        raise bad(f"input {tensor.name} must have either data or binary_data_size")
    if tensor.name == "pixels":
        pixels = _pixels(tensor, raw)
        return list(pixels)
    images = _texts(tensor) if raw is None else elements(raw, count)
    if len(images) != count:
        raise bad(f"input image has the shape {tensor.shape} and other than {count} elements")
    return images


def prepare(
    model: Model, parameters: Mapping[str, Parameter], wanted: Sequence[str] | None
) -> tuple[Asked, list[str]]:
    """What is asked of every image, and the names of the outputs to give.

    Raises:
        Problem: 400 an unknown output, one named twice, a parameter of a wrong type, no map.
        AlphaUnreachable: an alpha that the calibration set is too small for.
        UsageError: a level out of range, or of labels where the bundle gives none.
    """
    there = [name for name, _, _ in _there(model)]
    if wanted is None:
        asked_map = switch(parameters, HEATMAP, False)
        names = [name for name in there if name != "heatmap" or asked_map]
        if asked_map and not model.has_map:
            raise Problem(400, "no_map", f"the bundle {model.name} has no per-pixel map")
    else:
        names = list(wanted)
        for name in names:
            if name not in there:
                raise bad(f"no output {name[:40]!r}; there are {', '.join(there)}")
        if len(set(names)) < len(names):
            raise bad("an output is asked for twice; ask for each once")
    alpha, label_alpha, reject_cost = (
        _typed(parameters, name, float, "a number") for name in (ALPHA, LABEL_ALPHA, REJECT_COST)
    )
    timeout = _typed(parameters, TIMEOUT, int, "a whole number of microseconds")
    asked = Asked(
        model.detector.alpha(alpha),
        model.detector.labelling(label_alpha, reject_cost),
        heatmap="heatmap" in names,
        timeout=timeout / 1e6 if timeout and timeout > 0 else None,
    )
    return asked, names


def switch(parameters: Mapping[str, Parameter] | None, name: str, default: bool) -> bool:
    """A parameter that is true or false.

    Raises:
        Problem: 400 it is neither.
    """
    given = _typed(parameters or {}, name, bool, "true or false")
    return default if given is None else bool(given)


def outputs_of(model: Model, scored: Sequence[Scored], names: Sequence[str]) -> list[Output]:
    """The outputs that were asked for, in their order.

    Raises:
        Problem: 400 maps of several sizes in one tensor.
    """
    verdicts = [one.verdict for one in scored]
    n = len(verdicts)
    made = []
    for name in names:
        if name in CLASSES and verdicts[0].rejected is None:
            continue
        match name:
            case "outlier":
                flags = np.array([v.outlier for v in verdicts])
                made.append(Output(name, "BOOL", [n], flags))
            case "label" | "reason":
                texts = [(getattr(v, name) or "").encode() for v in verdicts]
                made.append(Output(name, "BYTES", [n], texts))
            case "posterior":
                classes = model.detector.manifest.classes or []
                rows = np.array([[(v.posterior or {})[c] for c in classes] for v in verdicts])
                made.append(Output(name, "FP64", [n, len(classes)], rows))
            case "heatmap":
                maps = _maps(scored)
                made.append(Output(name, "FP32", list(maps.shape), maps))
            case _:
                numbers = np.array([getattr(v, name) for v in verdicts], np.float64)
                made.append(Output(name, "FP64", [n], numbers))
    return made


def packed(output: Output) -> bytes:
    """The tensor's bytes: little-endian, row by row; strings with their lengths before them."""
    values = output.values
    if isinstance(values, list):
        return b"".join(struct.pack("<I", len(text)) + text for text in values)
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()


def check_elements(many: int) -> None:
    """Refuse lists that would hold up everybody else while they are read.

    Raises:
        Problem: 413 too long.
    """
    if many > MOST_ELEMENTS:
        detail = f"more than {MOST_ELEMENTS} elements in lists; send the tensor as binary data"
        raise Problem(413, "too_many_bytes", detail)


def check_maps(pixels: Sequence[Pixels]) -> None:
    """Refuse heatmaps of these images as lists that would hold up everybody else likewise.

    Raises:
        Problem: 413 too long.
    """
    many = sum(image.shape[0] * image.shape[1] for image in pixels)
    if many > MOST_ELEMENTS:
        detail = (
            f"the heatmap would be a list of {many} elements, at most {MOST_ELEMENTS}; ask for it "
            "with binary_data"
        )
        raise Problem(413, "too_many_pixels", detail)


def elements(raw: memoryview, most: int) -> list[memoryview]:
    """The strings of a BYTES tensor, each with its length before it.

    Args:
        raw: the tensor.
        most: strings; where there are more, one more is returned and the rest left.

    Raises:
        Problem: 400 a length that leads beyond the end.
    """
    found: list[memoryview] = []
    at, end = 0, len(raw)
    while at < end and len(found) <= most:
        if end - at < 4:
            raise bad("input image ends in the middle of a length; send uint32 and then bytes")
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4
        if size > end - at:
            raise bad(f"input image has an element of {size} bytes where {end - at} are left")
        found.append(raw[at : at + size])
        at += size
    return found


def _there(model: Model) -> list[tuple[str, str, list[int]]]:
    """Name, type and sides of each output of a model."""
    found: list[tuple[str, str, list[int]]] = [
        ("score", "FP64", []),
        ("bits_per_dim", "FP64", []),
        ("p_value", "FP64", []),
        ("outlier", "BOOL", []),
    ]
    if classes := model.detector.manifest.classes:
        found += [("label", "BYTES", []), ("posterior", "FP64", [len(classes)])]
        found.append(("reason", "BYTES", []))
    if model.has_map:
        found.append(("heatmap", "FP32", _sides(model)[:2]))
    return found


def _sides(model: Model) -> list[int]:
    spec = model.detector.spec
    return [-1, -1, spec.channels] if spec.tiled else [spec.height, spec.width, spec.channels]


def _described(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _triton_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _checked_shape(tensor: Tensor, most: int) -> int:
    """The number of images that the shape says."""
    name, shape = tensor.name[:40], tensor.shape
    if name not in ("image", "pixels"):
        raise bad(f"no input {name!r}; there are image (BYTES) and pixels (UINT8): give one")
    datatype = {"image": "BYTES", "pixels": "UINT8"}[name]
    if tensor.datatype != datatype:
        raise bad(f"input {name} must be {datatype}, not {tensor.datatype[:40]!r}")
    if not 1 <= len(shape) <= MOST_SIDES or any(side < 1 for side in shape):
        raise bad(f"input {name} must have sides of at least 1, not {str(shape)[:80]}")
    if name == "pixels" and (len(shape) != 4 or shape[3] not in (1, 3)):
        raise bad(f"input pixels must be [N, H, W, 1 or 3], not {shape}")
    if name == "image" and shape[1:] not in ([], [1]):
        raise bad(f"input image must be [N], not {shape}")
    if shape[0] > most:
        detail = f"{shape[0]} images in one request, at most {most}; send several requests"
        raise Problem(413, "too_many_images", detail)
    return shape[0]


def _pixels(tensor: Tensor, raw: memoryview | None) -> NDArray[np.uint8]:
    size = math.prod(tensor.shape)
    if raw is None:
        flat = _numbers(bytes(tensor.data), tensor.shape)
    else:
        flat = np.frombuffer(raw, np.uint8)
    if flat.size != size:
        raise bad(f"input pixels has the shape {tensor.shape} and {flat.size} bytes")
    return flat.reshape(tensor.shape)


def _numbers(data: bytes, shape: list[int]) -> NDArray[np.uint8]:
    opening = OPENING.match(data)
    depth = 0 if opening is None else opening[0].count(b"[")
    if depth not in NESTED:
        raise bad(f"input pixels must be flat or nested 4 deep, not {depth}")
    numbers = _strict(lambda d: msgspec.json.decode(d, type=NESTED[depth]), data, "input pixels")
    try:
        array = np.array(numbers, np.uint8)
    except ValueError:
        raise bad("input pixels is nested unevenly") from None
    if depth > 1 and list(array.shape) != shape:
        raise bad(f"input pixels has the shape {shape} and is nested as {list(array.shape)}")
    return array


def _texts(tensor: Tensor) -> list[bytes]:
    """The images in a JSON list of base64 strings, each of which may be a list of its own."""
    kind: Any = list[str | list[str]] if len(tensor.shape) > 1 else list[str]
    texts = _strict(lambda d: msgspec.json.decode(d, type=kind), bytes(tensor.data), "input image")
    images = []
    for text in texts:
        if isinstance(text, list):
            if len(text) != 1:
                raise bad(f"input image has the shape {tensor.shape}: one string a row")
            text = text[0]
        try:
            images.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            raise bad("input image must be base64 in JSON; or send it as binary data") from None
    return images


def _strict(decode: Callable[[Any], Any], data: bytes, what: str) -> Any:
    try:
        return decode(data)
    except msgspec.MsgspecError as error:
        raise bad(f"{what}: {error}") from None
    except RecursionError:
        raise bad(f"{what}: JSON is nested too deep") from None
    except UnicodeDecodeError:
        raise bad(f"{what}: JSON is not UTF-8") from None


def _typed(parameters: Mapping[str, Parameter], name: str, kind: type[Any], said: str) -> Any:
    value = parameters.get(name)
    if value is None:
        return None
    wrong = bad(f"parameter {name} must be {said}, not {repr(value)[:40]}")
    if isinstance(value, bool) != (kind is bool):
        raise wrong
    if kind is float:  # in a text, too: gRPC's older clients have no doubles
        try:
            return float(value)
        except (ValueError, OverflowError):
            raise wrong from None
    if not isinstance(value, kind) or (kind is int and abs(value) >= 1 << 63):
        raise wrong
    return value


def _maps(scored: Sequence[Scored]) -> NDArray[np.float32]:
    maps = [one.raw.nll_map[one.row] for one in scored if one.raw.nll_map is not None]
    if len({image.shape for image in maps}) > 1:
        raise bad("the images differ in size, and so do their heatmaps: ask for one at a time")
    stacked: NDArray[np.float32] = np.stack(maps)
    return np.nan_to_num(stacked, nan=LARGEST, posinf=LARGEST, neginf=-LARGEST)
