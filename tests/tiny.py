"""Working 4x4 bundles, made without torch, whose numbers are known in closed form.

    p(x) = product over the 16 pixels of q(x_i),      q(v) proportional to exp(-v / 24)

Pixels are independent and dark ones more likely. `tiny_bundle` writes it as a bundle; `draw` gives
images that follow it (normals), bright images are outliers. `tiny_autoencoder` keeps the mean
intensity of either half of an image, `tiny_classifier` tells dark from bright by them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from anomalyd.detect import tiling
from anomalyd.detect.bundle import (
    Calibration,
    Golden,
    Manifest,
    pack_calibration,
    pack_golden,
    write_bundle,
)
from anomalyd.detect.runtime import Session
from anomalyd.detect.statistics import typicality
from anomalyd.detect.texture import Texture
from anomalyd.images import ImageSpec, content_hash

SIDE = 4
STATISTICS = ("max_pixel_nll", "mean_intensity")
_weights = np.exp(-np.arange(256) / 24)
PROBABILITIES = _weights / _weights.sum()  # float64 (256,): q
NLL = -np.log(PROBABILITIES)  # float64 (256,), nats
HALVES = np.repeat(np.eye(2), 8, axis=0) / 8  # (16, 2): pixels to the mean of either half
CLASSIFY = np.array([[-4.0, 4.0], [-4.0, 4.0]])  # (2, 2): those to logits
CLASSES = ("dark", "bright")


def draw(n: int, seed: int = 0) -> np.ndarray:
    """Images from the density itself: uint8 (n, 4, 4, 1)."""
    rng = np.random.default_rng(seed)
    return rng.choice(256, (n, SIDE, SIDE, 1), p=PROBABILITIES).astype(np.uint8)


def nll(images: np.ndarray) -> np.ndarray:
    """Exact -log p(x): float64 (N,), nats."""
    return NLL[images].sum(axis=(1, 2, 3))


def statistics(images: np.ndarray) -> np.ndarray:
    """What the graph calls `statistics`: float32 (N, 2)."""
    most, mean = NLL[images].max(axis=(1, 2, 3)), images.mean(axis=(1, 2, 3))
    return np.stack([most, mean], axis=1).astype(np.float32)


def embedding(images: np.ndarray) -> np.ndarray:
    """Mean intensity of the upper and of the lower half, in [0, 1]: float32 (N, 2)."""
    return (images.reshape(len(images), -1) / 255 @ HALVES).astype(np.float32)


def log_posterior(images: np.ndarray) -> np.ndarray:
    """log p(y|x) of dark and bright, a softmax of the embedding: float32 (N, 2), nats."""
    logits = embedding(images).astype(np.float64) @ CLASSIFY
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)


def reconstruction_error(images: np.ndarray) -> np.ndarray:
    """Mean square of what the two means miss: float32 (N, 1)."""
    flat = images.reshape(len(images), -1) / 255
    missed = flat - embedding(images) @ (8 * HALVES.T)
    return (missed**2).mean(axis=1, keepdims=True).astype(np.float32)


def tiny_model() -> onnx.ModelProto:
    """The graph: image -> log_likelihood, statistics, nll_map."""
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["index"], to=TensorProto.INT64),
        node("Gather", ["table", "index"], ["nll_4d"]),
        node("Squeeze", ["nll_4d", "last"], ["nll_64"]),
        node("Cast", ["nll_64"], ["nll_map"], to=TensorProto.FLOAT),
        node("ReduceSum", ["nll_64", "sides"], ["nll_sum"], keepdims=0),
        node("Unsqueeze", ["nll_sum", "last_of_two"], ["nll_column"]),
        node("Neg", ["nll_column"], ["log_64"]),
        node("Cast", ["log_64"], ["log_likelihood"], to=TensorProto.FLOAT),
        node("ReduceMax", ["nll_map", "sides"], ["most"], keepdims=0),
        node("Unsqueeze", ["most", "last_of_two"], ["max_pixel_nll"]),
        node("Cast", ["image"], ["grey"], to=TensorProto.FLOAT),
        node("ReduceMean", ["grey", "pixels"], ["mean"], keepdims=0),
        node("Unsqueeze", ["mean", "last_of_two"], ["mean_intensity"]),
        node("Concat", ["max_pixel_nll", "mean_intensity"], ["statistics"], axis=1),
    ]
    constants = {
        "table": NLL,
        "last": np.array([3]),
        "sides": np.array([1, 2]),
        "pixels": np.array([1, 2, 3]),
        "last_of_two": np.array([1]),
    }
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("image", TensorProto.UINT8, ["N", SIDE, SIDE, 1])],
        [
            value("log_likelihood", TensorProto.FLOAT, ["N", 1]),
            value("statistics", TensorProto.FLOAT, ["N", len(STATISTICS)]),
            value("nll_map", TensorProto.FLOAT, ["N", SIDE, SIDE]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return _checked(graph)


def tiny_tiled_model() -> onnx.ModelProto:
    """The same graph with excess_map: nll against its mean under q, in standard deviations."""
    model = tiny_model()
    graph, node = model.graph, helper.make_node
    mean = (PROBABILITIES * NLL).sum()
    spread = np.sqrt((PROBABILITIES * NLL**2).sum() - mean**2)
    graph.node.extend(
        [
            node("Sub", ["nll_map", "mean_nll"], ["above"]),
            node("Div", ["above", "spread"], ["excess_map"]),
        ]
    )
    constants = {"mean_nll": np.float32(mean), "spread": np.float32(spread)}
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
    sides = ["N", SIDE, SIDE]
    graph.output.append(helper.make_tensor_value_info("excess_map", TensorProto.FLOAT, sides))
    onnx.checker.check_model(model, full_check=True)
    return model


def photographs(n: int, seed: int = 0, *, least: int = SIDE, most: int = 40) -> list[np.ndarray]:
    """Images from the density at sizes of their own: uint8 (H, W, 1) each."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(least, most + 1, (n, 2))
    return [rng.choice(256, (h, w, 1), p=PROBABILITIES).astype(np.uint8) for h, w in sizes]


def tiny_encoder(kind: str) -> onnx.ModelProto:
    """image -> statistics, embedding and, of a classifier, log_posterior."""
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["grey"], to=TensorProto.FLOAT),
        node("Reshape", ["grey", "flat"], ["pixels"]),
        node("Div", ["pixels", "white"], ["scaled"]),
        node("MatMul", ["scaled", "halves"], ["embedding"]),
    ]
    constants = {
        "flat": np.array([-1, SIDE * SIDE]),
        "white": np.float32(255),
        "halves": HALVES.astype(np.float32),
        "last": np.array([1]),
    }
    value = helper.make_tensor_value_info
    outputs = [
        value("statistics", TensorProto.FLOAT, ["N", 1]),
        value("embedding", TensorProto.FLOAT, ["N", 2]),
    ]
    if kind == "classifier":
        nodes += [
            node("MatMul", ["embedding", "classify"], ["logits"]),
            node("LogSoftmax", ["logits"], ["log_posterior"], axis=1),
            node("ReduceMax", ["log_posterior", "last"], ["statistics"]),
        ]
        constants["classify"] = CLASSIFY.astype(np.float32)
        outputs.insert(0, value("log_posterior", TensorProto.FLOAT, ["N", 2]))
    else:
        nodes += [
            node("MatMul", ["embedding", "decode"], ["decoded"]),
            node("Sub", ["scaled", "decoded"], ["missed"]),
            node("Mul", ["missed", "missed"], ["squared"]),
            node("ReduceMean", ["squared", "last"], ["statistics"]),
        ]
        constants["decode"] = (8 * HALVES.T).astype(np.float32)
    image = value("image", TensorProto.UINT8, ["N", SIDE, SIDE, 1])
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return _checked(helper.make_graph(nodes, kind, [image], outputs, tensors))


def tiny_sampler() -> onnx.ModelProto:
    """The density's sampler.onnx: image -> log_probs, the same everywhere, and order, one step."""
    node = helper.make_node
    nodes = [
        node("Shape", ["image"], ["sides"]),
        node("Concat", ["sides", "levels"], ["shape"], axis=0),
        node("Expand", ["table", "shape"], ["log_probs"]),
        node("Identity", ["zeros"], ["order"]),
    ]
    constants = {
        "levels": np.array([256]),
        "table": -NLL.astype(np.float32),
        "zeros": np.zeros((SIDE, SIDE, 1), np.int64),
    }
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "sampler",
        [value("image", TensorProto.UINT8, ["N", SIDE, SIDE, 1])],
        [
            value("log_probs", TensorProto.FLOAT, ["N", SIDE, SIDE, 1, 256]),
            value("order", TensorProto.INT64, [SIDE, SIDE, 1]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return _checked(graph)


def _checked(graph: onnx.GraphProto) -> onnx.ModelProto:
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="tiny"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def tiny_calibration(n: int = 199, m: int = 400) -> Calibration:
    """Calibrated on n drawn images, fitted on m others."""
    fit, calibration = draw(m, seed=1), draw(n, seed=2)
    fit_nll = np.sort(nll(fit))
    return Calibration(
        fit_nll=fit_nll,
        fit_statistics=statistics(fit),
        scores=np.sort(typicality(nll(calibration), fit_nll)),
        p_table=np.arange(1, n + 2) / (n + 1),
        training_hashes=np.sort(np.array([content_hash(x) for x in fit], np.uint64)),
        calibration_hashes=np.sort(np.array([content_hash(x) for x in calibration], np.uint64)),
    )


def tiny_golden(g: int = 4) -> Golden:
    """g drawn images with their exact scores."""
    images = draw(g, seed=3)
    return Golden(images, -nll(images)[:, None], statistics(images))


def tiny_manifest(**changes: Any) -> Manifest:
    """The manifest, with changes to its fields; `write_bundle` fills in `files`."""
    manifest = Manifest(
        format_version=1,
        name="tiny",
        version="1",
        kind="density",
        created="2026-01-01T00:00:00+00:00",
        image=ImageSpec(height=SIDE, width=SIDE, channels=1),
        likelihood="exact",
        score_name="typicality",
        guarantee={"kind": "marginal", "confidence": None},
        classes=None,
        priors=None,
        outputs={
            "log_likelihood": {"unit": "nats"},
            "statistics": {"unit": "mixed"},
            "nll_map": {"unit": "nats"},
        },
        statistics=list(STATISTICS),
        default_alpha=0.01,
        opset=18,
        parameters=256,
        bits_per_dim={"test": None},
        tolerance={"CPUExecutionProvider": 1e-5},
        calibration_n=199,
        files={},
        data_digest="synthetic",
        licence="Apache-2.0",
    )
    return dataclasses.replace(manifest, **changes)


@cache
def _model_bytes() -> bytes:
    return tiny_model().SerializeToString(deterministic=True)


def tiny_files(n: int = 199) -> dict[str, bytes]:
    """Content of every file but manifest.json."""
    return {
        "model.onnx": _model_bytes(),
        "calibration.npz": pack_calibration(tiny_calibration(n)),
        "golden.npz": pack_golden(tiny_golden()),
        "weights.safetensors": _safetensors("nll", NLL.astype("<f4")),
        "recipe.toml": b'model = "tiny"\n',
        "CARD.md": b"# tiny\n\nIndependent pixels, dark ones more likely.\n",
    }


def tiny_bundle(
    tmp_path: Path, *, n: int = 199, files: dict[str, bytes] | None = None, **changes: Any
) -> Path:
    """Write the bundle into tmp_path/NAME and return that folder.

    Args:
        tmp_path: folder to write into.
        n: calibration images.
        files: file contents to add or to put in place of the usual ones.
        changes: manifest fields to change; `name` is the folder's name, too.
    """
    changes.setdefault("default_alpha", max(0.01, 1 / (n + 1)))
    manifest = tiny_manifest(calibration_n=n, **changes)
    path = tmp_path / manifest.name
    write_bundle(path, manifest, {**tiny_files(n), **(files or {})})
    return path


def tiny_tiled(tmp_path: Path, *, n: int = 99, shrink: int = 1, **changes: Any) -> Path:
    """Write a bundle that scores photographs in 4x4 tiles; arguments as for `tiny_bundle`."""
    model = tiny_tiled_model().SerializeToString(deterministic=True)
    session = Session(model, device="cpu")
    spec = ImageSpec(SIDE, SIDE, 1, on_mismatch="tile", shrink=shrink)
    least = SIDE * shrink
    fit, held_out = photographs(60, 1, least=least), photographs(n, 2, least=least)
    texture = Texture.fit([tiling.field(session, spec, image) for image in fit])
    raw = tiling.run(session, spec, held_out, texture=texture)
    fitted = tiling.run(session, spec, fit, texture=texture)
    calibration = Calibration(
        **Calibration.by_nll(-fitted.log_likelihood[:, 0], fitted.statistics),
        scores=np.sort(raw.texture),
        p_table=np.arange(1, n + 2) / (n + 1),
        training_hashes=np.sort(np.array([content_hash(x) for x in fit], np.uint64)),
        calibration_hashes=np.sort(np.array([content_hash(x) for x in held_out], np.uint64)),
        tiles=np.sort(raw.tiles),
    )
    given = {
        "name": "tiled",
        "image": spec,
        "score_name": "texture",
        "outputs": {output: {"unit": "mixed"} for output in session.outputs},
        "default_alpha": max(0.01, 1 / (n + 1)),
        **changes,
    }
    manifest = tiny_manifest(calibration_n=n, **given)
    path = tmp_path / manifest.name
    files = {
        **tiny_files(),
        "model.onnx": model,
        "calibration.npz": pack_calibration(calibration),
        "texture.npz": texture.pack(),
    }
    write_bundle(path, manifest, files)
    return path


def tiny_classifier(
    tmp_path: Path, *, files: dict[str, bytes] | None = None, **changes: Any
) -> Path:
    """Write the classifier of dark and bright; arguments as for `tiny_bundle`."""
    fields = {"classes": list(CLASSES), "statistics": ["largest_log_posterior"], **changes}
    return _other_bundle(tmp_path, "classifier", files or {}, fields)


def tiny_autoencoder(
    tmp_path: Path, *, files: dict[str, bytes] | None = None, **changes: Any
) -> Path:
    """Write the autoencoder of two means; arguments as for `tiny_bundle`."""
    fields = {"statistics": ["reconstruction_error"], **changes}
    return _other_bundle(tmp_path, "autoencoder", files or {}, fields)


def other_golden(kind: str, g: int = 4) -> Golden:
    """g images, dark and bright, with what the classifier or the autoencoder says of them."""
    images = draw(g, seed=3)
    images[::2] = 255 - images[::2]
    none = np.empty((g, 0))
    if kind == "classifier":
        posterior = log_posterior(images)
        return Golden(images, none, posterior.max(axis=1, keepdims=True), posterior)
    return Golden(images, none, reconstruction_error(images), embedding=embedding(images))


def _other_bundle(
    tmp_path: Path, kind: str, files: dict[str, bytes], fields: dict[str, Any]
) -> Path:
    """A bundle that is no density."""
    model = tiny_encoder(kind)
    full = tiny_calibration()
    hashes = Calibration.hashes_alone(full.training_hashes, full.calibration_hashes)
    given = {
        "name": kind,
        "kind": kind,
        "likelihood": "none",
        "score_name": "none",
        "calibration_n": 0,
        "outputs": {output.name: {"unit": "mixed"} for output in model.graph.output},
        **fields,
    }
    manifest = tiny_manifest(**given)
    path = tmp_path / manifest.name
    usual = {
        "model.onnx": model.SerializeToString(deterministic=True),
        "calibration.npz": pack_calibration(hashes),
        "golden.npz": pack_golden(other_golden(kind)),
        "CARD.md": f"# {kind}\n\nTwo means of a tiny image.\n".encode(),
    }
    write_bundle(path, manifest, {**usual, **files})
    return path


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Change keys of a bundle's manifest.json behind the writer's back."""
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def put(path: Path, name: str, data: bytes) -> None:
    """Put a file into a bundle behind the writer's back, listed with its true size and hash."""
    (path / name).write_bytes(data)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    rewrite_manifest(path, files=files)


def check_line(error: Exception) -> None:
    """An error message is one line that a terminal shows as it is."""
    assert str(error).isprintable(), repr(error)


def _safetensors(name: str, array: np.ndarray) -> bytes:
    entry = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [0, array.nbytes]}
    header = json.dumps({name: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + array.tobytes()
