"""From a trained density to model.onnx, refused unless onnxruntime gives the same numbers."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from anomalyd.detect.manifest import OUTPUTS
from anomalyd.detect.runtime import Session
from anomalyd.errors import ExportError, MissingExtra

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from anomalyd.density.base import Density, Model

__all__ = ["OPSET", "TOLERANCE", "check_parity", "outputs_of", "to_onnx", "to_sampler", "to_steps"]

_M = TypeVar("_M", bound=torch.nn.Module)

OPSET = 20
"""Operator set of every exported graph; onnxruntime reads it since 1.17."""

TOLERANCE = 1e-5
"""Largest difference between torch and onnxruntime, bits per dimension."""

VERDICT = {"log_likelihood", "log_posterior", "statistics", "embedding"}
"""Outputs that verdicts rest on."""

AS_OUTPUT = ".output"

WORTH_HALVING = 256
"""Numbers above which half of a tensor's bytes are more than what a Cast takes."""

LOOSE = 1e-3
"""The same for posteriors in nats and for features, which nothing is promised about."""


class _Graph(torch.nn.Module):
    """The model with the outputs that a bundle's graph has."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(output for output in self.model(image) if output is not None)


class _Sampler(torch.nn.Module):
    """What sampling asks of a density: log p of every level, and the order of drawing."""

    def __init__(self, density: Density) -> None:
        super().__init__()
        self.density = density
        self.register_buffer("order", density.order, persistent=False)

    order: torch.Tensor

    def forward(
        self,
        image: torch.Tensor,
        label: torch.Tensor | None = None,
        latent: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        return self.density.log_probs(image, label, latent), self.order.clone()


def to_onnx(model: Model) -> bytes:
    """Return model.onnx: image -> the fields of what the model's `forward` returns.

    Inputs and outputs as in docs/bundle.md; the number of images is free.

    Raises:
        ExportError: the exporter cannot express the model.
        MissingExtra: onnx or onnxscript is not installed.
    """
    model = _prepared(model)
    example = _example(model)
    with torch.no_grad():
        outputs = model(example)
    return _exported(_Graph(model), {"image": example}, outputs_of(outputs), type(model).__name__)


def outputs_of(scores: Any) -> list[str]:
    """Name the outputs of a graph: the fields of a NamedTuple that are not None."""
    return [name for name in scores._fields if getattr(scores, name) is not None]


def to_sampler(density: Density) -> bytes:
    """Return sampler.onnx: image[, label][, latent] -> log_probs, order; as `Density.log_probs`.

    Raises:
        ExportError, MissingExtra: as `to_onnx`.
    """
    density = _prepared(density)
    given = {"image": _example(density)}
    if density.classes:
        given["label"] = torch.zeros(2, dtype=torch.int64)
    if density.latent:
        given["latent"] = torch.zeros(2, density.latent)
    return _exported(
        _Sampler(density),
        given,
        ["log_probs", "order"],
        f"the sampler of {type(density).__name__}",
    )


def to_steps(density: Density) -> dict[str, bytes]:
    """Return row.onnx and step.onnx, the cached sampler; nothing where the density has none.

    Raises:
        ExportError, MissingExtra: as `to_onnx`.
    """
    modules = _prepared(density).one_by_one()
    if modules is None:
        return {}
    row, step = modules
    shape, n = density.shape, 2
    pixel = torch.zeros(n, shape.channels, dtype=torch.uint8)
    given = {
        "row": pixel.unsqueeze(1).repeat(1, shape.width, 1),
        "place": torch.ones(1, dtype=torch.int64),
        "state": torch.zeros(n, row.state_size),
    }
    label = {"label": torch.zeros(n, dtype=torch.int64)} if density.classes else {}
    given |= label if row.labelled else {}
    with torch.no_grad():
        above = row(**given)[0]
    rows = _exported(row, given, ["above", "next_state"], "the row of a cached sampler")
    given = {
        "previous": pixel,
        "values": pixel.clone(),
        "above": above[:, 0],
        "place": torch.ones(2, dtype=torch.int64),
        "state": torch.zeros(n, step.state_size),
    }
    given |= label if step.labelled else {}
    steps = _exported(step, given, ["log_probs", "next_state"], "the step of a cached sampler")
    return {"row.onnx": rows, "step.onnx": steps}


def _prepared(model: _M) -> _M:
    return model.cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _example(model: Model) -> torch.Tensor:
    shape = model.shape
    return torch.zeros(2, shape.height, shape.width, shape.channels, dtype=torch.uint8)


def _exported(
    module: torch.nn.Module, given: dict[str, torch.Tensor], outputs: list[str], what: str
) -> bytes:
    """Export a module of keyword inputs, whose first dimension is free, without traces of here."""
    images = torch.export.Dim("N", min=1)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (),
                kwargs=given,
                input_names=list(given),
                output_names=[f"{name}{AS_OUTPUT}" for name in outputs],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes={name: {} if name == "place" else {0: images} for name in given},
                custom_translation_table=_written_out(),
                verbose=False,
            )
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "train") from error
    except torch.onnx.OnnxExporterError as error:
        first = str(error).strip().splitlines()[0]
        raise ExportError(f"{what} cannot be exported: {first}") from error
    if program is None:
        raise ExportError(f"{what} cannot be exported: no graph came back")
    proto = program.model_proto
    _strip_traces(proto)
    _name_outputs(proto.graph, outputs)
    _halve(proto.graph)
    return bytes(proto.SerializeToString())


def _written_out() -> dict[Any, Any]:
    """Operators that onnxruntime computes several times as fast from their parts, on the CPU."""
    from onnxscript import opset20 as op

    def elu(x: Any, alpha: float = 1.0) -> Any:
        below = op.Sub(op.Exp(op.Min(x, 0.0)), 1.0)
        return op.Add(op.Max(x, 0.0), op.Mul(below, alpha))

    def logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
        top = op.ReduceMax(x, dim, keepdims=True)
        total = op.Add(op.Log(op.ReduceSum(op.Exp(op.Sub(x, top)), dim, keepdims=True)), top)
        return total if keepdim else op.Squeeze(total, dim)

    aten = torch.ops.aten
    return {aten.elu.default: elu, aten.logsumexp.default: logsumexp}


def check_parity(
    model: Model, graph: bytes, images: NDArray[np.uint8], *, batch: int = 16
) -> float:
    """Hold the graph against torch on real images, whole batches and single images alike.

    The first of `OUTPUTS` within `TOLERANCE`, what else verdicts rest on relatively within
    `LOOSE`; maps are not compared.

    Args:
        model: the trained model.
        graph: its exported graph.
        images: uint8 (N, H, W, C).
        batch: images a call.

    Returns:
        the largest difference: in bits per dimension for a density, else as it is.

    Raises:
        ExportError: an output is further off than that.
    """
    session = Session(graph, device="cpu")
    model = model.cpu().eval()
    output = OUTPUTS[model.kind][0]
    scale = model.shape.dims * math.log(2) if output == "log_likelihood" else 1.0
    worst = dict.fromkeys(VERDICT.intersection(session.outputs), 0.0)
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        with torch.no_grad():
            said = model(torch.from_numpy(part.copy()))._asdict()
        for rows in (slice(None), slice(1)):
            raw = session.run(part[rows])
            for name in worst:
                expected = said[name][rows].double().numpy()
                off = np.abs(getattr(raw, name) - expected)
                off = off / (scale if name == output else 1 + np.abs(expected))
                worst[name] = float(np.maximum(worst[name], off.max()))  # max() would drop a NaN
    for name in sorted(worst, key=lambda name: name != output):  # what has a unit comes first
        tolerance = TOLERANCE if name == output == "log_likelihood" else LOOSE
        if not worst[name] <= tolerance:
            unit = model.unit if name == output else f"in {name}, relatively,"
            raise ExportError(
                f"onnxruntime differs from torch by {worst[name]:.1e} {unit} on {len(images)} "
                f"images; at most {tolerance:.0e} is allowed; the graph is not written"
            )
    return worst[output]


def _strip_traces(proto: Any) -> None:
    """Drop stack traces that the exporter notes on every node: paths of the machine it ran on."""
    _strip_graph(proto.graph)
    del proto.metadata_props[:]


def _name_outputs(graph: Any, outputs: list[str]) -> None:
    """Give outputs their names; a value inside that the exporter called the same makes way."""
    names = {name: f"{name}.inner" for name in outputs}
    names |= {f"{name}{AS_OUTPUT}": name for name in outputs}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.value_info, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)


def _halve(graph: Any) -> None:
    """Store in two bytes a number what half precision holds exactly; a Cast makes it float32.

    onnxruntime folds the casts when it opens the file: what it computes stays the same.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        whole = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = whole.astype(np.float16)
        if whole.size > WORTH_HALVING and np.array_equal(half.astype(np.float32), whole):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _strip_graph(graph: Any) -> None:
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:  # the bodies of scans
            if attribute.HasField("g"):
                _strip_graph(attribute.g)
    for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
    del graph.metadata_props[:]
    graph.doc_string = ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and deprecation chatter off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # The exporter itself calls functions that torch and copyreg have deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
