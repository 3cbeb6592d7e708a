"""Images drawn from a bundle's density, on onnxruntime and NumPy alone.

    noise u, one number a value          x_t = the level whose cumulative p(x_t | x_<t) covers u_t

Every method turns the same noise into the same image; they differ in how often they ask the graph:

    loop      for each step of the density's order: run the whole graph, draw that step
    jacobi    draw every value at once from the last image, until nothing changes: the fixed point
              is the loop's image, reached in fewer runs (never more than its steps and one)
    cached    row.onnx and step.onnx keep what they have computed: a pixel costs no whole image

It does not judge its images: a sample of an outlier model looks as convincing as any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalyd.detect.bundle import Manifest, read_bundle
from anomalyd.detect.runtime import FAILURES, inference_session
from anomalyd.errors import BundleError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    Floats = NDArray[np.float64]
    Levels = NDArray[np.int64]

__all__ = ["KEEP", "METHODS", "Drawn", "Sampler", "grid"]

METHODS = ("auto", "loop", "jacobi", "cached")
KEEP = {"top-quarter": 1 / 4, "top-half": 1 / 2, "top-three-quarters": 3 / 4}
"""What a completion keeps of an image -> that share of its rows."""

AT_ONCE = 1 << 24
"""Log-probabilities that one run of a graph returns, at most: 64 MB."""

GRAPHS = ("sampler.onnx", "row.onnx", "step.onnx")
NEAR = 1e-6


@dataclass(frozen=True, eq=False)
class Drawn:
    """Images drawn from a density.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: the class of each, by name; None without classes.
        method: how they were drawn.
        runs: how often the whole graph ran.
        near_ties: values whose noise lay within 1e-6 of a cumulative probability, where another
            method's rounding may choose the next level. Cumulative probabilities of the cached
            sampler differ from the whole graph's by more at times (1e-5, in large densities):
            then a level may differ that is not counted here.
    """

    images: NDArray[np.uint8]
    labels: list[str] | None
    method: str
    runs: int
    near_ties: int


class Sampler:
    """Draws from one bundle; immutable, safe to share between threads.

    Args:
        manifest: of the bundle.
        files: its graphs: sampler.onnx, and row.onnx and step.onnx where it has them.
        where: what messages call it.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads; None takes what this process may use.

    Raises:
        BundleError: there is no sampler, or onnxruntime refuses it.
        UsageError: an unknown device, or one that is not here.
    """

    def __init__(
        self,
        manifest: Manifest,
        files: Mapping[str, bytes],
        where: str,
        *,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        if "sampler.onnx" not in files:
            why = "no sampler (sampler.onnx) to draw from; `anomalyd export` adds one"
            if manifest.kind != "density":
                why = f"a {manifest.kind} has no density to draw from; train one, such as a vae"
            elif "max_probability" in manifest.statistics:  # which only a classifier has
                why = (
                    "p(x|y) of a composed bundle cannot be drawn; sample the density that it was "
                    "made from"
                )
            raise BundleError(f"{where}: {why}")
        self.where, self.manifest, self.spec = where, manifest, manifest.image
        self._byte_of = _bytes_of(self.spec.levels)

        def opened(name: str, threads: int | None) -> Any:
            what = f"{where}: {name}"
            return inference_session(files[name], device=device, threads=threads, what=what)

        self._graph = opened("sampler.onnx", threads)
        inputs = {value.name: value.shape for value in self._graph.get_inputs()}
        self._latent = inputs["latent"][1] if "latent" in inputs else 0
        self._cached = None
        if {"row.onnx", "step.onnx"} <= files.keys():
            # Its operators are too small to be worth a second thread.
            self._cached = opened("row.onnx", 1), opened("step.onnx", 1)
        zeros = np.zeros((1, *self._shape), np.uint8)
        given = self._given(np.zeros(1, np.int64), np.zeros((1, self._latent), np.float32))
        self.order: Levels = self._run(self._graph, ["order"], {"image": zeros, **given})[0]
        steps = np.unique(self.order)
        if not np.array_equal(steps, np.arange(len(steps))):
            raise BundleError(
                f"{where}: sampler.onnx: order must count its steps from 0 without gaps; "
                "export the bundle again"
            )

    @classmethod
    def load(
        cls, path: str | Path, *, device: str = "auto", threads: int | None = None
    ) -> Sampler:
        """Read a bundle and open its sampler; arguments and errors as above."""
        bundle = read_bundle(path)
        files = {name: bundle.graph(name) for name in GRAPHS if name in bundle.manifest.files}
        return cls(bundle.manifest, files, f"bundle {path}", device=device, threads=threads)

    @property
    def steps(self) -> int:
        """Steps in which an image is drawn one after the other."""
        return int(self.order.max()) + 1

    def draw(
        self,
        n: int,
        *,
        label: str | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        method: str = "auto",
        complete: NDArray[np.uint8] | None = None,
        keep: str = "top-half",
        progress: Callable[[int, int], object] | None = None,
    ) -> Drawn:
        """Draw n images.

        Args:
            n: how many.
            label: the class; None draws it from the priors, where there are classes.
            seed: of all noise: one seed, one set of images, whatever the method.
            temperature: T in p^(1/T), value by value; exact samples at 1, tamer ones below.
            method: one of `METHODS`; "auto" is the fastest that the bundle has.
            complete: uint8 (H, W, C) whose kept part is given and whose rest is drawn.
            keep: what is kept of it, a key of `KEEP`.
            progress: called with the steps done, on average over the images, and the steps
                there are at most.

        Raises:
            UsageError: n below 1, a seed below 0, a temperature that is not positive, an unknown
                label, method or part to keep, or one that this density cannot be given; an image
                to complete of another size.
            BundleError: the graph fails.
        """
        if n < 1:
            raise UsageError(f"a number of images must be at least 1, not {n}")
        if seed < 0:
            raise UsageError(f"a seed must be at least 0, not {seed}")
        if not 0 < temperature < math.inf:
            raise UsageError(f"a temperature must be a positive number, not {temperature}")
        open_, start = np.ones(self._shape, bool), np.zeros(self._shape, np.int64)
        if complete is not None:
            if complete.shape != self._shape:
                raise UsageError(
                    f"--complete: an image of {_size(complete.shape)} (height x width x channels) "
                    f"cannot be completed by {self.where}, which draws {_size(self._shape)}; give "
                    "one of that size"
                )
            open_ = ~self.kept(keep)
            start[~open_] = (complete.astype(np.int64) * self.spec.levels // 256)[~open_]
        chosen = self.method(method)
        # One stream of noise, read in two places: for the values, and after all those.
        rng, after = (np.random.Generator(np.random.PCG64(seed)) for _ in range(2))
        after.bit_generator.advance(n * start.size)  # type: ignore[attr-defined]
        labels = self._labels(label, n, after)
        latent = after.standard_normal((n, self._latent)).astype(np.float32)
        images = np.empty((n, *self._shape), np.uint8)
        size = max(1, AT_ONCE // (start.size * self.spec.levels))
        runs = ties = 0
        for first in range(0, n, size):
            some = slice(first, min(n, first + size))
            count = some.stop - first

            def tell(done: int, steps: int, before: int = first, count: int = count) -> None:
                if progress is not None:
                    progress((before * steps + count * done) // n, steps)

            noise = rng.random((count, *self._shape))
            run = _Run(
                self, noise, open_, temperature, self._given(labels[some], latent[some]), tell
            )
            levels = np.repeat(start[None], count, axis=0)
            images[some] = self._bytes(getattr(run, chosen)(levels))
            runs, ties = runs + run.runs, ties + int(run.ties.sum())
        names = self.manifest.classes
        return Drawn(
            images=images,
            labels=[names[y] for y in labels.tolist()] if names else None,
            method=chosen,
            runs=runs,
            near_ties=ties,
        )

    def kept(self, keep: str) -> NDArray[np.bool_]:
        """Which values a completion keeps: bool (H, W, C).

        Raises:
            UsageError: no such part, or one that this density does not draw first; a density of
                tiles.
        """
        if keep not in KEEP:
            raise UsageError(f"--keep {keep}: one of {', '.join(KEEP)}")
        if self.spec.on_mismatch == "tile":
            raise UsageError(
                f"--complete: {self.where} is a density of tiles, cut from photographs; it draws "
                "tiles, and completes no photograph"
            )
        kept = np.zeros(self._shape, bool)
        kept[: round(self.spec.height * KEEP[keep])] = True
        # What is kept must come first: else the rest is not drawn given all of it.
        if not kept.any() or kept.all() or self.order[kept].max() >= self.order[~kept].min():
            raise UsageError(
                f"--complete: {self.where} does not draw an image from the top down, so it cannot "
                "be given a top; use a PixelCNN or a PixelRNN"
            )
        return kept

    def method(self, asked: str) -> str:
        """The method that is meant: "auto" is the fastest there is.

        Raises:
            UsageError: no such method, or not for this bundle.
        """
        if asked not in METHODS:
            raise UsageError(f"a method is one of {', '.join(METHODS)}, not {asked!r}")
        if asked == "cached" and self._cached is None:
            raise UsageError(f"{self.where}: no cached sampler (row.onnx, step.onnx); use jacobi")
        if asked != "auto":
            return asked
        if self._cached is not None:
            return "cached"
        # An image of a single step per channel is drawn before a fixed point is confirmed.
        return "loop" if self.steps <= self.spec.channels else "jacobi"

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.spec.height, self.spec.width, self.spec.channels

    def _labels(self, label: str | None, n: int, rng: np.random.Generator) -> Levels:
        classes = self.manifest.classes
        if label is None:
            if not classes:
                return np.zeros(n, np.int64)
            return rng.choice(len(classes), n, p=self.manifest.priors).astype(np.int64)
        if not classes:
            raise UsageError(
                f"--label {label}: {self.where} was trained without classes; leave it out"
            )
        if label not in classes:
            raise UsageError(f"--label {label}: no such class; there are {', '.join(classes)}")
        return np.full(n, classes.index(label), np.int64)

    def _given(self, labels: Levels, latent: NDArray[np.float32]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.manifest.classes:
            given["label"] = labels
        if self._latent:
            given["latent"] = latent
        return given

    def _bytes(self, levels: Levels) -> NDArray[np.uint8]:
        """Map levels to bytes that the graph reads as those levels."""
        return self._byte_of[levels]

    def _run(self, session: Any, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        try:
            return list(session.run(outputs, inputs))
        except FAILURES as error:
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"{self.where}: the sampler fails: {reason}") from None


@dataclass(eq=False)
class _Run:
    """One draw: the noise, what is open, and the three ways from one to the other."""

    sampler: Sampler
    noise: Floats
    open: NDArray[np.bool_]
    temperature: float
    given: dict[str, Any]
    progress: Callable[[int, int], object]
    runs: int = 0

    def __post_init__(self) -> None:
        self.ties = np.zeros(self.noise.shape, bool)

    def loop(self, levels: Levels) -> Levels:
        order = self.sampler.order
        for step in range(self.sampler.steps):
            now = (order == step) & self.open
            if now.any():
                log_p = self._log_probs(levels)[:, now]
                levels[:, now] = self._choose(log_p, now)
            self._tell(step + 1)
        return levels

    def jacobi(self, levels: Levels) -> Levels:
        order = self.sampler.order
        for sweep in range(self.sampler.steps + 1):
            # After k sweeps the first k steps stand for good.
            now = (order >= sweep) & self.open
            if not now.any():
                break
            log_p = self._log_probs(levels)[:, now]
            drawn = self._choose(log_p, now)
            settled = bool((drawn == levels[:, now]).all())
            levels[:, now] = drawn
            self._tell(sweep + 1)
            if settled:
                break
        self._tell(self.sampler.steps)
        return levels

    def cached(self, levels: Levels) -> Levels:
        sampler = self.sampler
        if sampler._cached is None:
            raise ValueError("this bundle has no cached sampler")
        rows, steps = sampler._cached
        height, width, channels = sampler._shape
        n = len(levels)
        states = [np.zeros((n, _side(session, "state")), np.float32) for session in (rows, steps)]
        row_state, fresh = states
        above_row = np.zeros((n, width, channels), np.uint8)
        given_row = {
            value.name: self.given[value.name]
            for value in rows.get_inputs()
            if value.name in self.given
        }
        for row in range(height):
            above, row_state = sampler._run(
                rows,
                ["above", "next_state"],
                {"row": above_row, "place": np.array([row]), "state": row_state, **given_row},
            )
            state = fresh
            previous = np.zeros((n, channels), np.uint8)
            for column in range(width):
                inputs = {
                    "previous": previous,
                    "above": above[:, column],
                    "place": np.array([row, column]),
                    "state": state,
                    **self.given,
                }
                for channel in range(channels):
                    inputs["values"] = sampler._bytes(levels[:, row, column])
                    log_p, state = sampler._run(steps, ["log_probs", "next_state"], inputs)
                    if self.open[row, column, channel]:
                        place = np.s_[row, column, channel]
                        levels[:, *place] = self._choose(log_p[:, channel], place)
                previous = sampler._bytes(levels[:, row, column])
            above_row = sampler._bytes(levels[:, row])
            self._tell((row + 1) * width * channels)
        return levels

    def _log_probs(self, levels: Levels) -> NDArray[np.float32]:
        self.runs += 1
        image = {"image": self.sampler._bytes(levels), **self.given}
        found: NDArray[np.float32] = self.sampler._run(self.sampler._graph, ["log_probs"], image)[
            0
        ]
        return found

    def _choose(self, log_p: NDArray[np.float32], where: Any) -> Levels:
        """Return the levels whose cumulative probability covers the noise.

        Args:
            log_p: float32 (N, ..., levels), nats.
            where: a mask or an index of (H, W, C): which values these are.
        """
        index = (slice(None), *where) if isinstance(where, tuple) else (slice(None), where)
        noise = self.noise[index][..., None]
        below = log_p.astype(np.float64)
        # First below the likeliest level, then divided: what overflows is a probability of zero.
        below -= below.max(axis=-1, keepdims=True)
        with np.errstate(over="ignore"):
            below /= self.temperature
        cumulative = np.exp(below).cumsum(axis=-1)
        cumulative /= cumulative[..., -1:]
        self.ties[index] = (np.abs(cumulative[..., :-1] - noise) < NEAR).any(axis=-1)
        drawn: Levels = (cumulative <= noise).sum(axis=-1)
        return drawn.clip(max=log_p.shape[-1] - 1)

    def _tell(self, done: int) -> None:
        self.progress(done, self.sampler.steps)


def _bytes_of(levels: int) -> NDArray[np.uint8]:
    """Return a byte for each level that is quantised to it, black and white kept."""
    level = np.arange(levels)
    evenly = np.rint(level * 255 / (levels - 1))
    return np.maximum(evenly, np.ceil(level * 256 / levels)).astype(np.uint8)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _side(session: Any, name: str) -> int:
    return int(next(value.shape[1] for value in session.get_inputs() if value.name == name))


def grid(images: NDArray[np.uint8], *, columns: int | None = None, side: int = 112) -> Image.Image:
    """Lay images out on white, each enlarged by a whole factor to about `side` pixels.

    Args:
        images: uint8 (N, H, W, C).
        columns: images a row; None makes it square.
        side: of a tile, pixels.
    """
    from PIL import Image

    n, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    factor, gap = max(1, side // max(height, width)), 4
    tiles = images.repeat(factor, axis=1).repeat(factor, axis=2)
    size = (height * factor + gap, width * factor + gap)
    rows = math.ceil(n / columns)
    sheet = np.full((rows * size[0] + gap, columns * size[1] + gap, 3), 255, np.uint8)
    for place, tile in enumerate(tiles):
        top, left = (place // columns) * size[0] + gap, (place % columns) * size[1] + gap
        sheet[top : top + size[0] - gap, left : left + size[1] - gap] = tile
    return Image.fromarray(sheet)
