"""Anomaly detection on explicit image densities, with a false-alarm rate that can be promised."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# onnxruntime sends reports of its use to its makers unless it is told otherwise before it loads.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from anomalyd.detect.detector import Detector, Verdict

__all__ = ["Detector", "Verdict", "__version__"]


def __getattr__(name: str) -> Any:
    # Resolved late, so that `import anomalyd` and `anomalyd --help` load neither numpy nor
    # onnxruntime.
    if name in ("Detector", "Verdict"):
        from anomalyd.detect import detector

        return getattr(detector, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("anomalyd")
    raise AttributeError(f"module 'anomalyd' has no attribute {name!r}")
