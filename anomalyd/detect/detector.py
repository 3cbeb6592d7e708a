"""A bundle ready to judge images: the same code for Python, the batch command and the daemon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np

from anomalyd.detect import bayes, conformal, tiling
from anomalyd.detect.bayes import Labelling
from anomalyd.detect.bundle import Bundle, Calibration, Manifest, read_bundle
from anomalyd.detect.golden import open_session
from anomalyd.detect.runtime import Raw, Session
from anomalyd.detect.statistics import BY_CLASS, finite, make_score, negative_log_likelihood
from anomalyd.detect.texture import Texture
from anomalyd.errors import (
    AlphaUnreachable,
    BundleError,
    ImageError,
    SourceError,
    UsageError,
)
from anomalyd.images import ImageSpec, to_pixels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Image = str | Path | bytes | memoryview | NDArray[np.uint8]

__all__ = ["Detector", "Judged", "Verdict"]

DEFAULT = Labelling()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said about one image; numbers are always finite.

    Attributes:
        bits_per_dim: -log2 p(x) / (H W C), or its upper bound; a likelihood that is not a finite
            number gives a value near the largest float64.
        likelihood: what that number is: "exact", or the lower bound "elbo" or "iwae-K".
        score: what the verdict rests on; higher is stranger.
        score_name: which score that is.
        p_value: in (0, 1]; small is strange.
        alpha: rate of false alarms that was asked for, in (0, 1).
        outlier: p_value <= alpha; with `q_value`, the Benjamini-Hochberg decision.
        q_value: adjusted p-value within its batch, in (0, 1].
        label: the class, None where rejected or without classes.
        posterior: class -> probability.
        rejected: whether no class was given.
        reason: why not: "novel" or "ambiguous".
    """

    bits_per_dim: float
    likelihood: str
    score: float
    score_name: str
    p_value: float
    alpha: float
    outlier: bool
    q_value: float | None = None
    label: str | None = None
    posterior: dict[str, float] | None = None
    rejected: bool | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are present, in order; the label of a rejected image is None."""
        classified = self.rejected is not None
        return {
            name: value
            for name in _FIELDS
            if (value := getattr(self, name)) is not None or (name == "label" and classified)
        }


_FIELDS = tuple(field.name for field in fields(Verdict))


@dataclass(frozen=True, eq=False)
class Judged:
    """The verdicts on N images as columns.

    Attributes:
        bits_per_dim: float64 (N,).
        score: float64 (N,), higher is stranger.
        p_value: float64 (N,), in (0, 1].
        outlier: bool (N,).
        labelled: what Bayes' rule says of them; None where verdicts have no labels.
    """

    bits_per_dim: NDArray[np.float64]
    score: NDArray[np.float64]
    p_value: NDArray[np.float64]
    outlier: NDArray[np.bool_]
    labelled: bayes.Labelled | None = None


class Detector:
    """A bundle, its session and its calibration; immutable, safe to share between threads.

    Attributes:
        path: the bundle's folder.
        manifest: what the bundle says about itself.
        calibration: its conformal tables.
        session: its graph, running.
        spec: the images it takes.
        texture: what judges photographs that are scored in tiles; None where images are whole.
    """

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.bundle = bundle
        self.path: Path = bundle.path
        self.manifest: Manifest = bundle.manifest
        self.calibration: Calibration = bundle.calibration
        self.session = session
        self.spec: ImageSpec = bundle.manifest.image
        self.texture: Texture | None = None
        try:
            if self.spec.tiled:
                self.texture = Texture.unpack(bundle.read("texture.npz"))
            else:
                self._score = make_score(bundle.manifest.score_name, bundle.calibration.fit)
        except BundleError as error:
            raise BundleError(f"bundle {bundle.path}: {error}") from None
        self._tables = bundle.calibration.per_class()
        self._fit_statistics = np.sort(bundle.calibration.fit_statistics, axis=0)

    @classmethod
    def load(
        cls, path: str | Path, *, device: str = "auto", threads: int | None = None
    ) -> Detector:
        """Read a bundle, verify it, and see that its graph gives the golden scores here.

        Args:
            path: the bundle's folder.
            device: "auto", "cpu" or "cuda".
            threads: CPU threads; None takes what this process may use.

        Raises:
            BundleError: naming what is wrong with the bundle, or that it is no density.
            UsageError: an unknown device, or one that is not here.
        """
        return cls.start(read_bundle(path), device=device, threads=threads)

    @classmethod
    def start(
        cls, bundle: Bundle, *, device: str = "auto", threads: int | None = None
    ) -> Detector:
        """The same for a bundle that has been read."""
        kind = bundle.manifest.kind
        if kind != "density":
            raise BundleError(
                f"bundle {bundle.path}: of kind {kind}, which has no density to score by; it is "
                "for `anomalyd embed` and `anomalyd train --init`; score with a density, by "
                "classes with a class-conditional one"
            )
        return cls(bundle, open_session(bundle, device=device, threads=threads))

    @property
    def labels(self) -> bool:
        """Whether verdicts have a label: the bundle rejects what fits no class."""
        return self.manifest.score_name == BY_CLASS

    @property
    def classes(self) -> list[str]:
        """Names of the classes; none without."""
        return self.manifest.classes or []

    def class_of(self, name: str, label: str | None) -> int:
        """The place of an image's class among the bundle's.

        Raises:
            SourceError: the image has no label, or one that the bundle does not know.
        """
        if label not in self.classes:
            what = "has no label" if label is None else f"is labelled {label!r}"
            raise SourceError(
                f"{name} {what}; the classes of bundle {self.path} are {', '.join(self.classes)}"
            )
        return self.classes.index(label)

    @property
    def calibrated_on(self) -> int:
        """The calibration images that the smallest p-value rests on: those of the rarest class."""
        counts = self.calibration.class_counts
        return self.manifest.calibration_n if counts is None else int(counts.min())

    @property
    def confidence(self) -> float | None:
        """The confidence of the guarantee; None for the marginal one."""
        return self.manifest.guarantee["confidence"]

    @property
    def dimensions(self) -> int:
        """H W C, what bits per dimension are counted over."""
        return self.spec.height * self.spec.width * self.spec.channels

    @overload  # bytes and arrays are iterables, too, and the first signature that fits is taken
    def score(self, images: Image, *, alpha: float | None = None, **labelling: Any) -> Verdict: ...
    @overload
    def score(
        self, images: Iterable[Image], *, alpha: float | None = None, **labelling: Any
    ) -> list[Verdict]: ...
    def score(
        self, images: Image | Iterable[Image], *, alpha: float | None = None, **labelling: Any
    ) -> Verdict | list[Verdict]:
        """Judge one image or many.

        Args:
            images: a path, encoded bytes or uint8 pixels (H, W[, C]), or an iterable of these
                (an array (N, H, W, C) among them), which is read as it is needed.
            alpha: rate of false alarms; None takes the bundle's default.
            labelling: `label_alpha`, `reject_cost` and `priors`, as `labelling()` takes them.

        Returns:
            one verdict for one image, a list for an iterable.

        Raises:
            ImageError: an image that cannot be read; the subclass says in which way, the message
                which one of many.
            AlphaUnreachable: an alpha that the calibration set is too small for.
        """
        level, asked = self.alpha(alpha), self.labelling(**labelling)
        if isinstance(images, str | Path | bytes | bytearray | memoryview) or (
            isinstance(images, np.ndarray) and images.ndim <= 3
        ):
            return self.judge(self.run([self._pixels(images)]), level, asked)[0]
        verdicts: list[Verdict] = []
        size = 1 if self.spec.tiled else self.session.batch
        for batch in _batches(enumerate(images), size):
            raw = self.run([self._pixels(image, f"image {place}") for place, image in batch])
            verdicts += self.judge(raw, level, asked)
        return verdicts

    def run(self, images: Sequence[NDArray[np.uint8]], *, nll_map: bool = False) -> Raw:
        """Raw scores of images from `to_pixels`, whole or in tiles as the bundle says."""
        return tiling.run(self.session, self.spec, images, texture=self.texture, nll_map=nll_map)

    def alpha(self, asked: float | None) -> float:
        """The alpha to use: the bundle's default, or the one asked for if it can be reached.

        Raises:
            AlphaUnreachable: too small for the calibration set, naming the images still needed.
            UsageError: outside [1e-12, 1).
        """
        if asked is None:
            # The smallest p-value may be an ulp above the default that was written beside it.
            return max(self.manifest.default_alpha, self.calibration.smallest)
        try:
            return conformal.check_alpha(asked, self.calibrated_on, self.confidence)
        except AlphaUnreachable as error:
            counts = self.calibration.class_counts
            if counts is None:
                raise
            raise AlphaUnreachable(
                f"class {self.classes[int(counts.argmin())]}: {error}"
            ) from None

    def labelling(
        self,
        label_alpha: float | None = None,
        reject_cost: float | None = None,
        priors: Mapping[str, float] | None = None,
    ) -> Labelling:
        """What is asked of labels, held against the bundle; None takes the default.

        Raises:
            UsageError: the bundle's verdicts have no labels, a value out of range, priors of
                other classes or of another sum than 1.
        """
        given = {"label-alpha": label_alpha, "reject-cost": reject_cost, "prior": priors or None}
        if not self.labels:
            for name, value in given.items():
                if value is not None:
                    raise UsageError(
                        f"{name}: bundle {self.path} gives no labels; train one with --labels"
                    )
        return Labelling(
            bayes.DEFAULT_LABEL_ALPHA if label_alpha is None else label_alpha,
            reject_cost,
            bayes.check_priors(priors, self.classes) if priors else None,
        )

    def columns(self, raw: Raw, alpha: float, asked: Labelling = DEFAULT) -> Judged:
        """The verdicts on N images as arrays."""
        bits_per_dim = self.nll(raw) / (self.dimensions * math.log(2))
        score = self.scores(raw)
        # The p-value in the class where it is largest: then each class keeps the promise.
        p_value = np.max(
            [
                conformal.p_values(own, *table)
                for own, table in zip(self._in_classes(score, raw), self._tables, strict=True)
            ],
            axis=0,
        )
        outlier = p_value <= alpha
        labelled = None
        if self.labels:
            labelled = bayes.label(
                raw.log_likelihood,
                outlier,
                asked,
                priors=self.manifest.priors,
                temperature=cast("float", self.manifest.temperature),
                label_scores=cast("NDArray[np.float64]", self.calibration.label_scores),
            )
        return Judged(bits_per_dim, score, p_value, outlier, labelled)

    def judge(self, raw: Raw, alpha: float, asked: Labelling = DEFAULT) -> list[Verdict]:
        """The verdict on each of N images, by raw scores and an alpha from `alpha()`."""
        judged = self.columns(raw, alpha, asked)
        likelihood, name = self.manifest.likelihood, self.manifest.score_name
        return [
            Verdict(bits, likelihood, score, name, p_value, alpha, outlier, **said)
            for bits, score, p_value, outlier, said in zip(
                judged.bits_per_dim.tolist(),
                judged.score.tolist(),
                judged.p_value.tolist(),
                judged.outlier.tolist(),
                self.said(judged),
                strict=True,
            )
        ]

    def said(self, judged: Judged) -> list[dict[str, Any]]:
        """The fields of each verdict that labels add: label, posterior, rejected and reason."""
        labelled = judged.labelled
        if labelled is None:
            return [{}] * len(judged.score)
        names = self.classes
        reasons = np.where(labelled.novel, bayes.NOVEL, bayes.AMBIGUOUS).tolist()
        return [
            {
                "label": None if rejected else names[place],
                "posterior": dict(zip(names, posterior, strict=True)),
                "rejected": rejected,
                "reason": reason if rejected else None,
            }
            for place, posterior, rejected, reason in zip(
                labelled.label.tolist(),
                labelled.posterior.tolist(),
                labelled.rejected.tolist(),
                reasons,
                strict=True,
            )
        ]

    def nll(self, raw: Raw) -> NDArray[np.float64]:
        """-log p(x): float64 (N,) nats, finite; with classes p(x) = sum over y of p(y) p(x|y).

        Of an image in tiles the mean over them.
        """
        return negative_log_likelihood(raw.log_likelihood, self.manifest.priors)

    def unfamiliar(self, raw: Raw) -> int:
        """How many images have fewer or more tiles than any that the bundle is calibrated on."""
        known = self.calibration.tiles
        if known is None or raw.tiles is None:
            return 0
        return int(((raw.tiles < known[0]) | (raw.tiles > known[-1])).sum())

    def size_warning(self, count: int) -> str | None:
        """What to say of so many `unfamiliar` images; None of none."""
        known = self.calibration.tiles
        if not count or known is None:
            return None
        return (
            f"{count} images are smaller or larger than any that the bundle is calibrated on "
            f"({known[0]} to {known[-1]} tiles): their p-values promise nothing"
        )

    def scores(self, raw: Raw) -> NDArray[np.float64]:
        """What verdicts rest on: float64 (N,), finite, higher is stranger."""
        if raw.texture is not None:
            return finite(raw.texture)
        return self._score(self.nll(raw), raw.statistics, raw.embedding)

    def _in_classes(self, score: NDArray[np.float64], raw: Raw) -> NDArray[np.float64]:
        """How strange each image is to each class: float64 (K, N); (1, N) without labels."""
        if not self.labels:
            return score[None]
        manifest = self.manifest
        posterior = bayes.log_posterior(
            raw.log_likelihood, manifest.priors, cast("float", manifest.temperature)
        )
        return bayes.class_scores(score, posterior, manifest.doubt).T

    def explain(self, raw: Raw, row: int) -> dict[str, dict[str, Any]]:
        """Each statistic of one image with where it stands among the fit split's.

        The p-value is two-sided, 2 min(1 + #{fit <= value}, 1 + #{fit >= value}) / (m + 1) up to
        1, and not adjusted for there being many: a diagnostic, never a verdict.

        Returns:
            statistic -> {"value", "p_value", "diagnostic": True}.
        """
        explained = {}
        for column, name in enumerate(self.manifest.statistics):
            value = raw.statistics[row, column]
            fit = self._fit_statistics[:, column]
            below = int(np.searchsorted(fit, value, side="right"))
            above = fit.size - int(np.searchsorted(fit, value, side="left"))
            p_value = min(1.0, 2 * (1 + min(below, above)) / (fit.size + 1))
            number = float(finite(np.array([value], np.float64))[0])
            explained[name] = {"value": number, "p_value": p_value, "diagnostic": True}
        return explained

    def _pixels(self, image: Image, which: str = "") -> NDArray[np.uint8]:
        path = Path(image) if isinstance(image, str | Path) else None
        try:
            return to_pixels(cast("Path | bytes", image) if path is None else path, self.spec)
        except ImageError as error:
            name = which if path is None else str(path)
            raise type(error)(f"{name}: {error}" if name else str(error)) from error


def _batches(images: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(images)
    while batch := list(islice(iterator, size)):
        yield batch
