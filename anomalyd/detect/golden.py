"""A bundle's graph, started and held to its golden images: what every load begins with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalyd.detect.manifest import OUTPUTS
from anomalyd.detect.runtime import CPU, Session
from anomalyd.errors import BundleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.detect.bundle import Bundle, Golden, Manifest

__all__ = ["check_golden", "open_session"]

# On the CPU, and elsewhere. Relative and absolute, but for the likelihood: that is in bits/dim,
# and the manifest may say otherwise for a provider.
TOLERANCES = {
    "log_likelihood": (1e-5, 1e-4),
    "log_posterior": (1e-4, 1e-3),
    "embedding": (1e-3, 1e-3),
    "statistics": (1e-3, 1e-3),
}
RETRY = "use another --device or export the bundle again"


def open_session(bundle: Bundle, *, device: str = "auto", threads: int | None = None) -> Session:
    """A session on the graph of a bundle of any kind, which gives the golden numbers here.

    Args:
        bundle: from `read_bundle`.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads; None takes what this process may use.

    Raises:
        BundleError: a graph that onnxruntime refuses or that gives other numbers.
        UsageError: an unknown device, or one that is not here.
    """
    try:
        session = Session(bundle.model, device=device, threads=threads)
        check_golden(session, bundle.manifest, bundle.golden)
    except BundleError as error:
        raise BundleError(f"bundle {bundle.path}: {error}") from None
    return session


def check_golden(session: Session, manifest: Manifest, golden: Golden) -> None:
    """Hold a graph to the golden images: the main output of its kind, and the statistics.

    Raises:
        BundleError: an output that is off, and by how much it may be.
    """
    main = OUTPUTS[manifest.kind][0]
    raw = session.run(golden.images)
    provider = session.provider
    for name in (main, "statistics"):
        got, expected = getattr(raw, name), getattr(golden, name)
        if got.shape != expected.shape:
            raise BundleError(
                f"model.onnx gives {name} of shape {got.shape} for the golden images, and "
                f"golden.npz says {expected.shape}; export the bundle again"
            )
        allowed = TOLERANCES[name][provider != CPU]
        if name == "log_likelihood":
            if provider != CPU:
                allowed = manifest.tolerance.get(provider, allowed)
            _check_likelihood(got, expected, golden.images[0].size, allowed, provider)
        elif not np.allclose(got, expected, rtol=allowed, atol=allowed):
            raise BundleError(
                f"golden {name}: the graph is off by more than {allowed:g} on {provider}; {RETRY}"
            )


def _check_likelihood(
    got: NDArray[Any], expected: NDArray[Any], dimensions: int, allowed: float, provider: str
) -> None:
    with np.errstate(invalid="ignore"):
        off = float(np.max(np.abs(got - expected))) / (dimensions * math.log(2))
    # Written so that NaN is refused as well.
    if not off <= allowed:
        raise BundleError(
            f"the graph's golden scores are off by {off:.2g} bits/dim on {provider}, and "
            f"{allowed:g} is allowed; {RETRY}"
        )
