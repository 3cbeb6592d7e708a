"""What a reader must know of an ONNX file before onnxruntime sees it, by a walk over its bytes.

ONNX is protobuf: a message is a sequence of (field number, wire type, payload), and a payload may
be a message again. The walk visits every place where a tensor can sit

    model -> graph -> initializer, sparse_initializer
                   -> node -> attribute -> t, tensors, sparse_tensor, sparse_tensors
                                        -> g, graphs -> (a graph again)
    model -> functions -> node ... and attribute_proto ...

and refuses tensors whose data lies outside the file, operators that are not ONNX's own, local
functions and training graphs. It needs no onnx package and raises nothing but BundleError.

It does not check that the graph is valid: onnxruntime does, after this.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

from anomalyd.detect.manifest import Manifest
from anomalyd.errors import BundleError

__all__ = ["Graph", "Tensor", "check_graph", "scan_model"]

MAX_FIELDS = 1_000_000
MAX_DEPTH = 16  # of subgraphs within subgraphs
STANDARD_DOMAINS = ("", "ai.onnx")
RANDOM = frozenset(
    [
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    ]
)
ELEMENT_TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
}

FIXED = "fixed"
_Sides = tuple[int | str | None, ...]  # a number, FIXED for some number, "N" for open, None: any
_Port = tuple[str, _Sides]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = (
    "its data lies outside the bundle's verified bytes; save the model with its data inside"
)


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph.

    Attributes:
        name: its name.
        dtype: NumPy's name of the element type, or "type <number>" for a rare one.
        shape: a number, a symbol or None (unknown) per dimension; None where undeclared.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass
class Graph:
    """What the walk found.

    Attributes:
        opset: version of ONNX's own operator set.
        inputs: inputs that are not initialisers, in order.
        outputs: outputs, in order.
        operators: types of all operators, in subgraphs too.
    """

    opset: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    operators: set[str] = field(default_factory=set)


def scan_model(data: bytes, what: str = "model.onnx") -> Graph:
    """Walk over an ONNX file.

    Args:
        data: its bytes.
        what: its name, for messages.

    Raises:
        BundleError: no such file, damaged, or one that refers to anything outside itself.
    """
    if data[4:8] == b"ORTM":
        # onnxruntime would read it as a flatbuffer, whatever it is as protobuf.
        raise BundleError(f"{what}: an ORT format file, not an ONNX one; export it to ONNX")
    try:
        return _scan(_Message(memoryview(data), _Budget()))
    except _Refused as error:
        raise BundleError(f"{what}: {error}") from None


def check_graph(graph: Graph, manifest: Manifest, what: str = "model.onnx") -> None:
    """Hold a graph against its contract: names, types and shapes of inputs and outputs.

    Args:
        graph: what `scan_model` found.
        manifest: what the bundle says of it.
        what: its name; a file that no contract is known for is taken as it is.

    Raises:
        BundleError: naming the input or output, what it must be and what it is.
    """
    check = _CHECKS.get(what)
    if check is None:
        return
    try:
        check(graph, manifest)
    except _Refused as error:
        raise BundleError(f"{what}: {error}") from None


class _Refused(Exception):
    """A message without the file's name."""


def _scan(model: _Message) -> Graph:
    graph = Graph()
    for opset in model.messages(8):
        if opset.text(1) in STANDARD_DOMAINS:
            graph.opset = opset.number(2)
    body = model.merged(7)
    _scan_graph(body, graph, "graph", 0)
    for function in model.messages(25):
        name = reprlib.repr(function.text(1))
        _scan_nodes(function.messages(7), graph, f"function {name}", 0)
        _scan_attributes(function.messages(11), graph, f"function {name}", 0)
    if model.has(25):
        raise _Refused(
            f"local function {name}: functions can stand in for any operator; "
            "inline them (onnx.inliner) and export again"
        )
    if model.has(20):
        raise _Refused("training graphs are not for serving; export it for inference")
    if not graph.opset:
        raise _Refused("no ONNX operator set is named; is this an ONNX model at all?")
    initial = {tensor.text(8) for tensor in body.messages(5)}
    graph.inputs = [t for t in map(_tensor, body.messages(11)) if t.name not in initial]
    graph.outputs = [_tensor(value) for value in body.messages(12)]
    return graph


def _scan_graph(body: _Message, graph: Graph, where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _Refused(f"subgraphs are nested deeper than {MAX_DEPTH}; flatten the model")
    for tensor in body.messages(5):
        _scan_tensor(tensor, f"initialiser {reprlib.repr(tensor.text(8))} of {where}")
    for sparse in body.messages(15):
        _scan_sparse(sparse, f"sparse initialiser of {where}")
    _scan_nodes(body.messages(1), graph, where, depth)


def _scan_nodes(nodes: list[_Message], graph: Graph, where: str, depth: int) -> None:
    for node in nodes:
        operator = node.text(4)
        for domain in node.texts(7):
            if domain not in STANDARD_DOMAINS:
                raise _Refused(
                    f"operator {reprlib.repr(operator)} of {where} is of the domain "
                    f"{reprlib.repr(domain)}, which is code that a bundle cannot carry; "
                    "export with ONNX's own operators"
                )
        graph.operators.add(operator)
        _scan_attributes(node.messages(5), graph, f"{reprlib.repr(operator)} of {where}", depth)


def _scan_attributes(attributes: list[_Message], graph: Graph, where: str, depth: int) -> None:
    for attribute in attributes:
        name = f"attribute {reprlib.repr(attribute.text(1))} of {where}"
        for tensor in attribute.messages(5) + attribute.messages(10):
            _scan_tensor(tensor, name)
        for sparse in attribute.messages(22) + attribute.messages(23):
            _scan_sparse(sparse, name)
        for body in attribute.messages(6) + attribute.messages(11):
            _scan_graph(body, graph, "a subgraph", depth + 1)


def _scan_sparse(sparse: _Message, where: str) -> None:
    for tensor in sparse.messages(1) + sparse.messages(2):
        _scan_tensor(tensor, where)


def _scan_tensor(tensor: _Message, where: str) -> None:
    if tensor.has(13) or any(tensor.numbers(14)):
        raise _Refused(
            f"external data in {where}: it lies outside the bytes that were verified; "
            "save the model with its data inside"
        )


def _tensor(value: _Message) -> Tensor:
    kind = value.merged(2).merged(1)
    number = kind.number(1)
    shape = kind.merged(2) if kind.has(2) else None
    return Tensor(
        value.text(1),
        ELEMENT_TYPES.get(number, f"type {number}"),
        None if shape is None else tuple(_dimension(side) for side in shape.messages(1)),
    )


def _dimension(side: _Message) -> int | str | None:
    if side.has(1):
        return side.number(1)
    return side.text(2) or None


def _check_model(graph: Graph, manifest: Manifest) -> None:
    if graph.opset != manifest.opset:
        raise _Refused(f"opset is {graph.opset} where the manifest says {manifest.opset}")
    _check_names(graph.outputs, manifest.outputs.keys())
    _check_scoring(graph, manifest)


def _check_explain(graph: Graph, manifest: Manifest) -> None:
    _check_is_density(manifest)
    _check_names(graph.outputs, set(), {"nll_map", "excess_map", "embedding"})
    if not graph.outputs:
        raise _Refused("has no outputs; leave the file out")
    _check_scoring(graph, manifest)


def _check_scoring(graph: Graph, manifest: Manifest) -> None:
    """What model.onnx and explain.onnx have in common."""
    _check_fixed(graph, "one image must always get one score; use fixed noise")
    image = manifest.image
    if [tensor.name for tensor in graph.inputs] != ["image"]:
        names = [tensor.name for tensor in graph.inputs]
        raise _Refused(f"must have the one input 'image', not {reprlib.repr(names)}")
    _check_tensor(graph.inputs[0], "uint8", ("N", image.height, image.width, image.channels))
    classes = len(manifest.classes) if manifest.classes else None
    sides: dict[str, _Sides] = {
        "log_likelihood": ("N", classes),
        "log_posterior": ("N", classes),
        "statistics": ("N", len(manifest.statistics)),
        "nll_map": ("N", image.height, image.width),
        "excess_map": ("N", image.height, image.width),
        "embedding": ("N", None),
    }
    for tensor in graph.outputs:
        if tensor.name in sides:
            _check_tensor(tensor, "float32", sides[tensor.name])


def _check_sampler(graph: Graph, manifest: Manifest) -> None:
    image = manifest.image
    sides = (image.height, image.width, image.channels)
    _check_drawing(
        graph,
        manifest,
        {"image": ("uint8", ("N", *sides)), **_label(manifest)},
        {"log_probs": ("float32", ("N", *sides, image.levels)), "order": ("int64", sides)},
        optional={"latent": ("float32", ("N", FIXED))},
    )


def _check_row(graph: Graph, manifest: Manifest) -> None:
    image, state = manifest.image, ("float32", ("N", FIXED))
    _check_drawing(
        graph,
        manifest,
        {
            "row": ("uint8", ("N", image.width, image.channels)),
            "place": ("int64", (1,)),
            "state": state,
        },
        {"above": ("float32", ("N", image.width, FIXED)), "next_state": state},
        optional=_label(manifest),
    )


def _check_step(graph: Graph, manifest: Manifest) -> None:
    image, state = manifest.image, ("float32", ("N", FIXED))
    pixel = ("uint8", ("N", image.channels))
    _check_drawing(
        graph,
        manifest,
        {
            "previous": pixel,
            "values": pixel,
            "above": ("float32", ("N", FIXED)),
            "place": ("int64", (2,)),
            "state": state,
            **_label(manifest),
        },
        {"log_probs": ("float32", ("N", image.channels, image.levels)), "next_state": state},
    )


def _label(manifest: Manifest) -> dict[str, _Port]:
    return {"label": ("int64", ("N",))} if manifest.classes else {}


def _check_drawing(
    graph: Graph,
    manifest: Manifest,
    inputs: Mapping[str, _Port],
    outputs: Mapping[str, _Port],
    optional: Mapping[str, _Port] | None = None,
) -> None:
    """What the graphs that images are drawn with have in common."""
    more = optional or {}
    _check_is_density(manifest)
    _check_fixed(graph, "whoever runs a sampler draws; leave it out")
    _check_names(graph.inputs, inputs.keys(), more.keys(), "inputs")
    _check_names(graph.outputs, outputs.keys())
    for tensors, known in ((graph.inputs, {**inputs, **more}), (graph.outputs, outputs)):
        for tensor in tensors:
            _check_tensor(tensor, *known[tensor.name])


_CHECKS = {
    "model.onnx": _check_model,
    "explain.onnx": _check_explain,
    "sampler.onnx": _check_sampler,
    "row.onnx": _check_row,
    "step.onnx": _check_step,
}


def _check_is_density(manifest: Manifest) -> None:
    if manifest.kind != "density":
        raise _Refused(f"belongs to a density, and kind is {manifest.kind}; leave it out")


def _check_fixed(graph: Graph, rule: str) -> None:
    random = sorted(graph.operators & RANDOM)
    if random:
        raise _Refused(f"operator {random[0]} draws at random, and {rule}")


def _check_names(
    tensors: list[Tensor],
    needed: Set[str],
    optional: Set[str] = frozenset(),
    which: str = "outputs",
) -> None:
    names = [tensor.name for tensor in tensors]
    if not needed <= {*names} <= needed | optional or len({*names}) < len(names):
        more = f" and at most {reprlib.repr(sorted(optional))} more" if optional else ""
        raise _Refused(
            f"{which} must be {reprlib.repr(sorted(needed))}{more}, "
            f"not {reprlib.repr(sorted(names))}"
        )


def _check_tensor(tensor: Tensor, dtype: str, sides: _Sides) -> None:
    """Sides known on both sides must agree; N, where there is one, must be left open."""
    shape = tensor.shape
    if shape is None:
        fits = FIXED not in sides
    else:
        fits = len(shape) == len(sides) and all(map(_side_agrees, shape, sides))
    agrees = tensor.dtype == dtype and fits
    if not agrees:
        wanted = ", ".join("any" if side is None else str(side) for side in sides)
        raise _Refused(
            f"{tensor.name} must be {dtype} with shape ({wanted}), "
            f"not {tensor.dtype} with shape {shape}"
        )


def _side_agrees(found: int | str | None, wanted: int | str | None) -> bool:
    if wanted == FIXED:
        return isinstance(found, int) and found > 0
    return not isinstance(found, int) or wanted is None or found == wanted


@dataclass
class _Budget:
    """Fields that may still be read, over the whole file."""

    left: int = MAX_FIELDS


class _Message:
    """One protobuf message: its fields by number, submessages left unread until asked for.

    Stricter than protobuf where that costs nothing: groups, a known field of another wire type
    and numbers beyond their range are refused instead of skipped or truncated.
    """

    def __init__(self, data: memoryview, budget: _Budget) -> None:
        self._budget = budget
        self._fields: dict[int, list[int | memoryview]] = {}
        for number, value in _wire(data, budget):
            self._fields.setdefault(number, []).append(value)

    def has(self, number: int) -> bool:
        return number in self._fields

    def messages(self, number: int) -> list[_Message]:
        return [_Message(payload, self._budget) for payload in self._payloads(number)]

    def merged(self, number: int) -> _Message:
        """A singular submessage; protobuf merges repetitions, which is to join their bytes."""
        return _Message(memoryview(b"".join(self._payloads(number))), self._budget)

    def text(self, number: int) -> str:
        """The last one wins, as in protobuf; empty where there is none."""
        return (self.texts(number) or [""])[-1]

    def texts(self, number: int) -> list[str]:
        try:
            return [str(payload, "utf-8") for payload in self._payloads(number)]
        except UnicodeDecodeError:
            raise _malformed("a name that is not UTF-8") from None

    def number(self, number: int) -> int:
        return (self.numbers(number) or [0])[-1]

    def numbers(self, number: int) -> list[int]:
        values = self._fields.get(number, [])
        if not all(isinstance(value, int) for value in values):
            raise _malformed(f"field {number} holds no number")
        return [value for value in values if isinstance(value, int)]

    def _payloads(self, number: int) -> list[memoryview]:
        values = self._fields.get(number, [])
        if not all(isinstance(value, memoryview) for value in values):
            raise _malformed(f"field {number} holds no message or text")
        return [value for value in values if isinstance(value, memoryview)]


def _wire(data: memoryview, budget: _Budget) -> Iterator[tuple[int, int | memoryview]]:
    """Fields of a message: (number, int or payload)."""
    at, end = 0, len(data)
    while at < end:
        budget.left -= 1
        if budget.left < 0:
            raise _Refused(f"more than {MAX_FIELDS} fields; the model is too fragmented to check")
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if not number or tag >= 1 << 32:
            raise _malformed(f"field number {number}")
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise _malformed(f"wire type {kind}")
        if size > end - at:
            raise _malformed(f"a field of {size} bytes where {end - at} are left")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    if at < len(data) and data[at] < 0x80:  # nearly all of them
        return data[at], at + 1
    value = shift = 0
    for place in range(at, min(at + 10, len(data))):
        byte = data[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place + 1
        shift += 7
    raise _malformed("a number that does not end")


def _malformed(found: str) -> _Refused:
    return _Refused(f"truncated or not an ONNX file ({found}); export or copy it again")
