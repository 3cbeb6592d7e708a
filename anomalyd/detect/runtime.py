"""One onnxruntime session around a bundle's graph: pixels in, raw scores and features out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from anomalyd.errors import BundleError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CPU", "CUDA", "DEVICES", "Raw", "Session", "available_cpus", "inference_session"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
DEVICES = ("auto", "cpu", "cuda")
ALWAYS = ("log_likelihood", "log_posterior", "statistics", "embedding")
"""Fetched where the graph has them."""
FATAL = 4  # onnxruntime's log severity; errors still reach us, as exceptions

# onnxruntime's own exceptions have no base class of theirs; RuntimeError is what options raise.
FAILURES: tuple[type[Exception], ...] = (
    native.EPFail,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True, eq=False)
class Raw:
    """What is known of N images before anything is judged.

    Attributes:
        log_likelihood: float64 (N, K), nats; K is 1 without classes, 0 without a density.
        statistics: float32 (N, S), named in the manifest.
        nll_map: float32 (N, H, W), nats per pixel; a list of N float32 (H, W) where images are
            scored in tiles and differ in size; None where it was not asked for.
        log_posterior: float32 (N, K), nats: log p(y|x); None where the graph is no classifier.
        embedding: float32 (N, E); None where the graph has no encoder.
        excess_map: float32 (N, H, W), standard deviations; None where it was not asked for.
        tiles: int64 (N,), how many tiles each image was cut into; the rows above are then means
            over them. None where images are whole.
        texture: float64 (N,), nats: what the texture says of each photograph; None likewise.
    """

    log_likelihood: NDArray[np.float64]
    statistics: NDArray[np.float32]
    nll_map: NDArray[np.float32] | list[NDArray[np.float32]] | None = None
    log_posterior: NDArray[np.float32] | None = None
    embedding: NDArray[np.float32] | None = None
    excess_map: NDArray[np.float32] | None = None
    tiles: NDArray[np.int64] | None = None
    texture: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.log_likelihood)

    def __getitem__(self, rows: slice | NDArray[np.intp] | NDArray[np.bool_]) -> Raw:
        maps = self.nll_map
        if isinstance(maps, list):
            maps = [maps[i] for i in np.arange(len(self))[rows]]
        elif maps is not None:
            maps = maps[rows]
        return Raw(
            self.log_likelihood[rows],
            self.statistics[rows],
            maps,
            None if self.log_posterior is None else self.log_posterior[rows],
            None if self.embedding is None else self.embedding[rows],
            None if self.excess_map is None else self.excess_map[rows],
            None if self.tiles is None else self.tiles[rows],
            None if self.texture is None else self.texture[rows],
        )

    @staticmethod
    def concat(parts: Sequence[Raw]) -> Raw:
        """The rows of all parts in order; at least one part."""
        if len(parts) == 1:
            return parts[0]
        return Raw(
            np.concatenate([part.log_likelihood for part in parts]),
            np.concatenate([part.statistics for part in parts]),
            _joined_maps([part.nll_map for part in parts if part.nll_map is not None]),
            _joined([part.log_posterior for part in parts]),
            _joined([part.embedding for part in parts]),
            _joined([part.excess_map for part in parts]),
            _joined([part.tiles for part in parts]),
            _joined([part.texture for part in parts]),
        )


def _joined(arrays: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None


def _joined_maps(
    maps: Sequence[NDArray[np.float32] | list[NDArray[np.float32]]],
) -> NDArray[np.float32] | list[NDArray[np.float32]] | None:
    if any(isinstance(part, list) for part in maps):
        return [image for part in maps for image in part]
    return np.concatenate(maps) if maps else None


class Session:
    """A graph ready to run; safe to share between threads.

    Any number of images is split into batches of 2^k, so that onnxruntime sees few shapes, its
    memory stays flat, and no slot is spent on padding. Threads share the batches and not the
    graph's nodes: these are so small that the threads would mostly wait for one another.

    Args:
        model: bytes of model.onnx, already scanned by `read_bundle`.
        device: "auto" takes CUDA where it works, "cpu", or "cuda" (an error where it does not).
        threads: batches that run side by side, each in one CPU thread; None takes as many as
            this process may use. On CUDA one batch runs at a time.
        batch: the largest batch, a power of 2; None goes by the pixels of an image: activations
            that stay in a CPU's cache (32 thumbnails), eight times as many on CUDA.

    Raises:
        UsageError: an unknown device, or "cuda" without a working one.
        BundleError: a graph that onnxruntime refuses.
    """

    def __init__(
        self,
        model: bytes,
        *,
        device: str = "auto",
        threads: int | None = None,
        batch: int | None = None,
    ) -> None:
        self._session = inference_session(model, device=device, threads=1)
        self.provider: str = self._session.get_providers()[0]
        self._threads = 1 if self.provider == CUDA else threads or available_cpus()
        # The caller's own thread is one of them.
        self._helpers = ThreadPoolExecutor(max(1, self._threads - 1), thread_name_prefix="run")
        self.batch = batch or _batch(self._session.get_inputs()[0].shape, self.provider)
        self.outputs = [output.name for output in self._session.get_outputs()]

    def run(
        self,
        images: NDArray[np.uint8],
        *,
        nll_map: bool = False,
        excess_map: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> Raw:
        """Score images.

        Args:
            images: uint8 (N, H, W, C), N >= 1.
            nll_map: fetch the per-pixel map too.
            excess_map: fetch what of the per-pixel map was not expected too.
            progress: called after each batch, in any thread, with the number of images in it.

        Raises:
            BundleError: what was asked for is not in the graph, or the graph fails.
        """
        fetch = [name for name in ALWAYS if name in self.outputs]
        if nll_map:
            if "nll_map" not in self.outputs:
                raise BundleError("model.onnx has no per-pixel map (nll_map): no heatmaps from it")
            fetch.append("nll_map")
        if excess_map:
            if "excess_map" not in self.outputs:
                raise BundleError("model.onnx does not say what it expects (excess_map): no tiles")
            fetch.append("excess_map")
        batches = list(self._batches(len(images)))
        left = iter(batches)  # `next` is atomic
        parts: dict[int, Raw] = {}

        def work() -> None:
            try:
                for start, stop in left:
                    parts[start] = self._run(images[start:stop], fetch)
                    if progress is not None:
                        progress(stop - start)
            except BaseException:
                list(left)  # the others need not go on
                raise

        helpers = min(self._threads, len(batches)) - 1
        helping = [self._helpers.submit(work) for _ in range(helpers)]
        try:
            work()
        finally:
            wait(helping)
        for helper in helping:
            helper.result()
        return Raw.concat([parts[start] for start, _ in batches])

    def rest(self, images: NDArray[np.uint8]) -> None:
        """Score a few more, and give back the memory that all took; the next batch takes it again.

        Args:
            images: uint8 (N, H, W, C), N >= 1.
        """
        options = ort.RunOptions()
        cuda = ";gpu:0" if self.provider == CUDA else ""
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"cpu:0{cuda}")
        self._session.run(self.outputs[:1], {"image": images}, options)

    def _run(self, images: NDArray[np.uint8], fetch: list[str]) -> Raw:
        try:
            found = dict(zip(fetch, self._session.run(fetch, {"image": images}), strict=True))
        except FAILURES as error:
            raise BundleError(f"model.onnx fails on images: {_first_line(error)}") from None
        likelihood = found.pop("log_likelihood", None)
        if likelihood is None:
            likelihood = np.empty((len(images), 0))
        return Raw(likelihood.astype(np.float64), **found)

    def _batches(self, n: int) -> Iterator[tuple[int, int]]:
        """Where batches start and stop, the largest first, so that threads end together."""
        start = 0
        share = -(-n // self._threads)
        size = min(self.batch, 1 << (share.bit_length() - 1))
        while start < n:
            while size > n - start:
                size //= 2
            yield start, start + size
            start += size


def inference_session(
    model: bytes, *, device: str = "auto", threads: int | None = None, what: str = "model.onnx"
) -> ort.InferenceSession:
    """Return onnxruntime's session for a scanned graph; arguments and errors as in `Session`."""
    wanted = _provider(device)
    providers: list[str | tuple[str, dict[str, str]]] = [CPU]
    if wanted == CUDA:
        # TF32 is off by a thousandth: golden scores would not come out.
        providers.insert(0, (CUDA, {"use_tf32": "0"}))
    try:
        session = ort.InferenceSession(model, _options(threads), providers)
    except FAILURES as error:
        raise BundleError(f"{what}: onnxruntime refuses it: {_first_line(error)}") from None
    if device == "cuda" and session.get_providers()[0] != CUDA:
        raise UsageError("device cuda: onnxruntime could not start CUDA here; use --device cpu")
    return session


def _batch(shape: Sequence[int | str | None], provider: str) -> int:
    pixels = 1
    for side in shape[1:3]:
        pixels *= side if isinstance(side, int) else 1
    most, budget = (256, 1 << 18) if provider == CUDA else (32, 1 << 15)
    return 1 << (min(most, max(1, budget // pixels)).bit_length() - 1)


def available_cpus() -> int:
    """CPUs this process may use: its affinity, cut down to its control group's quota."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, count if quota is None else min(count, round(quota)))


def _cgroup_quota(root: Path) -> float | None:
    """CPUs that version 2 (`cpu.max`) or version 1 of control groups leaves us; None: no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        cpus = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return cpus if cpus > 0 else None


def _provider(device: str) -> str:
    if device not in DEVICES:
        raise UsageError(f"device must be one of {', '.join(DEVICES)}, not {device!r}")
    if device == "cpu":
        return CPU
    # Asked for CUDA without a driver, onnxruntime prints to stderr and falls back: look first.
    if CUDA in ort.get_available_providers() and _driver_loads():
        return CUDA
    if device == "cuda":
        raise UsageError(
            "device cuda: no NVIDIA driver (libcuda) or no onnxruntime-gpu here; use --device cpu"
        )
    return CPU


def _driver_loads() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cpus()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = FATAL
    # Idle threads that spin would take the CPU from decoding and from other bundles.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
