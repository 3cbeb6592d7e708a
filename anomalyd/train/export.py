"""From a trained density to model.onnx, refused unless onnxruntime gives the same numbers."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from anomalyd.detect.runtime import Session
from anomalyd.errors import ExportError, MissingExtra

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from anomalyd.density.base import Density

__all__ = ["OPSET", "TOLERANCE", "check_parity", "to_onnx"]

OPSET = 20
"""Operator set of every exported graph; onnxruntime reads it since 1.17."""

TOLERANCE = 1e-5
"""Largest difference between torch and onnxruntime, bits per dimension."""


class _Graph(torch.nn.Module):
    """The density with the names and the types that a bundle's graph has."""

    def __init__(self, density: Density) -> None:
        super().__init__()
        self.density = density

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = self.density(image)
        return scores.log_likelihood, scores.statistics, scores.nll_map


def to_onnx(density: Density) -> bytes:
    """Return the graph: image -> log_likelihood, statistics, nll_map.

    Inputs and outputs as in docs/bundle.md; the number of images is free.

    Raises:
        ExportError: the exporter cannot express the density.
        MissingExtra: onnx or onnxscript is not installed.
    """
    shape = density.shape
    example = torch.zeros(2, shape.height, shape.width, shape.channels, dtype=torch.uint8)
    density = density.cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    try:
        with _quiet():
            program = torch.onnx.export(
                _Graph(density),
                (example,),
                input_names=["image"],
                output_names=["log_likelihood", "statistics", "nll_map"],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes={"image": {0: torch.export.Dim("N", min=1)}},
                verbose=False,
            )
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "train") from error
    except torch.onnx.OnnxExporterError as error:
        first = str(error).strip().splitlines()[0]
        raise ExportError(f"{type(density).__name__} cannot be exported: {first}") from error
    if program is None:
        raise ExportError(f"{type(density).__name__} cannot be exported: no graph came back")
    proto = program.model_proto
    _strip_traces(proto)
    return bytes(proto.SerializeToString())


@dataclass(frozen=True)
class Parity:
    """Largest differences found, in bits per dimension and in each statistic's own unit."""

    bits_per_dim: float
    statistics: float


def check_parity(
    density: Density, model: bytes, images: NDArray[np.uint8], *, batch: int = 16
) -> Parity:
    """Hold the graph against torch on real images, whole batches and single images alike.

    Args:
        density: the trained density.
        model: the exported graph.
        images: uint8 (N, H, W, C).
        batch: images a call.

    Raises:
        ExportError: a log-likelihood differs by more than `TOLERANCE` bits per dimension.
    """
    session = Session(model, device="cpu")
    density = density.cpu().eval()
    worst = worst_statistic = 0.0
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        with torch.no_grad():
            expected = density(torch.from_numpy(part.copy()))
        likelihood = expected.log_likelihood.double().numpy()
        statistics = expected.statistics.double().numpy()
        whole, alone = session.run(part), session.run(part[:1])
        worst = max(
            worst,
            float(np.abs(whole.log_likelihood - likelihood).max()),
            float(np.abs(alone.log_likelihood - likelihood[:1]).max()),
        )
        scale = np.maximum(1.0, np.abs(statistics))
        worst_statistic = max(
            worst_statistic, float((np.abs(whole.statistics - statistics) / scale).max())
        )
    bits = worst / (density.shape.dims * math.log(2))
    if not bits <= TOLERANCE:
        raise ExportError(
            f"onnxruntime differs from torch by {bits:.1e} bits/dim on {len(images)} images; at "
            f"most {TOLERANCE:.0e} is allowed; the graph is not written"
        )
    return Parity(bits_per_dim=bits, statistics=worst_statistic)


def _strip_traces(proto: object) -> None:
    """Drop stack traces that the exporter notes on every node: paths of the machine it ran on."""
    graph = proto.graph  # type: ignore[attr-defined]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
    del graph.metadata_props[:]
    del proto.metadata_props[:]  # type: ignore[attr-defined]


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
