"""What every peer shares: the bundle's graph under the daemon's session options, one decoder.

Imported in environments that do not have anomalyd. BUNDLE names the bundle, THREADS the CPUs.
"""

import io
import math
import os

import numpy as np
import onnxruntime as ort
from PIL import Image

MAX_BATCH = 32
OUTPUTS = ["log_likelihood", "statistics"]


def open_session() -> ort.InferenceSession:
    """The graph, as `anomalyd.detect.runtime` opens it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(os.environ["THREADS"])
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = os.path.join(os.environ["BUNDLE"], "model.onnx")
    return ort.InferenceSession(model, options, ["CPUExecutionProvider"])


def decode(data: bytes) -> np.ndarray:
    """Pixels of an image, uint8 (H, W, C)."""
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def bits_per_dim(session: ort.InferenceSession, images: list[np.ndarray]) -> list[float]:
    """One number an image, in runs of 2^k images, so that onnxruntime sees few shapes."""
    stack, found = np.stack(images), []
    size = MAX_BATCH
    while len(found) < len(stack):
        while size > len(stack) - len(found):
            size //= 2
        batch = stack[len(found) : len(found) + size]
        likelihood = session.run(OUTPUTS, {"image": batch})[0]
        found += (-likelihood[:, 0] / (batch[0].size * math.log(2))).tolist()
    return found
