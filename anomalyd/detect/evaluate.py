"""How well a bundle tells outliers from normal images, with what chance alone would do beside it.

Outliers are the positive class everywhere, and higher scores are stranger. Images are streamed:
of each one the scores are kept, its header and its name, and of a few their items, to look at.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from anomalyd.detect import bayes, conformal
from anomalyd.detect.classification import Classification, Said, classification
from anomalyd.detect.discoveries import (
    SHARE,
    SPLITS,
    Discoveries,
    discoveries,
    discoveries_given,
)
from anomalyd.detect.golden import open_session
from anomalyd.detect.localisation import FALSE_POSITIVES, Localisation, PixelCounts
from anomalyd.detect.measures import Separation, separation
from anomalyd.detect.metadata import Telltale, telltale
from anomalyd.detect.pipeline import Slab, item_name, maps_of, none_readable, scored
from anomalyd.detect.statistics import finite
from anomalyd.errors import BundleError, ImageError, SourceError, UsageError
from anomalyd.images import read_header, to_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.detect.bayes import Labelled, Labelling
    from anomalyd.detect.bundle import Bundle
    from anomalyd.detect.detector import Detector, Judged
    from anomalyd.detect.runtime import Raw
    from anomalyd.images import Header
    from anomalyd.sources import Item, Source

    Floats = NDArray[np.float64]

__all__ = [
    "ALPHAS",
    "Baseline",
    "Evaluated",
    "Level",
    "OutlierSet",
    "Proportion",
    "Sample",
    "evaluate",
    "sample",
]

ALPHAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
FDR = 0.1
NORMAL = "normal"
SEEN_LIMIT = 0.01  # share of images that training or calibration may have seen
SHOWN = 8  # images of a set that are worth a look
DIGITS = 6


@dataclass(frozen=True)
class Proportion:
    """A share of images.

    Attributes:
        value: in [0, 1].
        ci95: its exact 95 % confidence interval (Clopper, Pearson, 1934).
    """

    value: float
    ci95: tuple[float, float]

    @classmethod
    def of(cls, flags: NDArray[np.bool_]) -> Proportion:
        """The share of True among N >= 1."""
        count = int(flags.sum())
        return cls(count / flags.size, conformal.clopper_pearson(count, flags.size))


@dataclass(frozen=True)
class Level:
    """What an alpha costs and what it catches.

    Attributes:
        alpha: the rate of false alarms that is promised, in (0, 1).
        observed: the rate seen on the normal images, in [0, 1].
        band: where 99.9 % of such rates fall if the promise holds; where it holds in each class,
            from 0, for then most classes have fewer than they might, to the end of the widest
            band of a class.
        recall: name of set -> share of its outliers flagged.
    """

    alpha: float
    observed: float
    band: tuple[float, float]
    recall: dict[str, Proportion]


@dataclass(frozen=True, eq=False)
class Sample:
    """One set of images, scored.

    Attributes:
        scores: name of score -> float64 (N,), the verdict's first.
        p_values: float64 (N,), in (0, 1].
        extremes: the strangest of normal images, the most normal of outliers, those first that
            are most so.
    """

    scores: dict[str, Floats]
    p_values: Floats
    extremes: list[Item]

    def __len__(self) -> int:
        return len(self.p_values)


@dataclass(frozen=True, eq=False)
class OutlierSet:
    """One set of outliers against the normal images.

    Attributes:
        sample: its images, scored.
        base_rate: the share of outliers that AUPR is stated for.
        scores: name of score -> how well it separates, the verdict's first.
        discoveries: what flags at a false discovery rate would be.
        telltale: the part of the headers that tells these outliers best.
        localisation: how well maps point at its masks; None without masks or maps.
    """

    sample: Sample
    base_rate: float
    scores: dict[str, Separation]
    discoveries: Discoveries
    telltale: Telltale
    localisation: Localisation | None

    @property
    def n(self) -> int:
        """Outliers."""
        return len(self.sample)

    @property
    def verdict(self) -> Separation:
        """How well the score separates that verdicts rest on."""
        return next(iter(self.scores.values()))


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What `evaluate` found.

    Attributes:
        bundle: name of the bundle.
        score: name of the score that verdicts rest on.
        likelihood: "exact", or the bound that `bits_per_dim` rests on.
        bits_per_dim: mean over the normal images.
        alpha: the one asked for.
        fdr: the false discovery rate of the simulated batches.
        levels: that alpha and the usual ones that can be reached, ascending.
        normal: the normal images, scored.
        outliers: name of set -> result.
        localisation: over all sets that have masks; None where none has.
        seen: name of set -> images dropped because training or calibration has seen them.
        unreadable: (name, reason) of what could not be read.
        warnings: what makes the numbers doubtful, one sentence each.
        classification: how good labels and rejections are; None where they were not asked for.
    """

    bundle: str
    score: str
    likelihood: str
    bits_per_dim: float
    alpha: float
    fdr: float
    levels: list[Level]
    normal: Sample
    outliers: dict[str, OutlierSet]
    localisation: Localisation | None
    seen: dict[str, list[str]]
    unreadable: list[tuple[str, str]]
    warnings: list[str]
    classification: Classification | None = None

    @property
    def level(self) -> Level:
        """The one of the alpha asked for."""
        return next(level for level in self.levels if level.alpha == self.alpha)

    def to_dict(self) -> dict[str, Any]:
        """The object that `evaluate --format json` prints."""
        level, sets = self.level, self.outliers
        batches = {name: found.discoveries for name, found in sets.items()}
        located = {name: found.localisation for name, found in sets.items() if found.localisation}
        printed = {
            "bundle": self.bundle,
            "score": self.score,
            "likelihood": self.likelihood,
            "n": len(self.normal),
            "bits_per_dim": self.bits_per_dim,
            "false_alarm_rate": {
                "alpha": level.alpha,
                "observed": level.observed,
                "n": len(self.normal),
                "band": level.band,
            },
            **self._measures(self.score),
            "recall": {
                name: {"alpha": level.alpha, "value": found.value, "ci95": found.ci95}
                for name, found in level.recall.items()
            },
            "scores": {score: self._measures(score) for score in self.normal.scores},
            "alphas": [
                {
                    "alpha": each.alpha,
                    "observed": each.observed,
                    "band": each.band,
                    "recall": {name: found.value for name, found in each.recall.items()},
                }
                for each in self.levels
            ],
            "fdr": {
                "q": self.fdr,
                "splits": SPLITS,
                "outliers": SHARE,
                "mean_fdp": {name: found.mean_fdp for name, found in batches.items()},
                "standard_error": {name: found.standard_error for name, found in batches.items()},
                "power": {name: found.power for name, found in batches.items()},
            },
            "metadata_auroc": {
                name: {"feature": found.telltale.feature, "value": found.telltale.auroc}
                for name, found in sets.items()
            },
            "seen": {name: len(names) for name, names in self.seen.items()},
            "warnings": self.warnings,
        }
        if self.classification is not None:
            printed["classification"] = self.classification.to_dict()
        if self.localisation is not None:
            printed["pixel_auroc"] = {name: found.pixel_auroc for name, found in located.items()}
            printed["aupro"] = {name: found.aupro for name, found in located.items()}
            printed["localisation"] = {
                "sets": list(located),
                "limit": FALSE_POSITIVES,
                "pixel_auroc": self.localisation.pixel_auroc,
                "aupro": self.localisation.aupro,
            }
        rounded: dict[str, Any] = _rounded(printed)
        return rounded

    def _measures(self, score: str) -> dict[str, Any]:
        """How well one score separates each set."""
        sets = {name: found.scores[score] for name, found in self.outliers.items()}
        return {
            "auroc": {name: found.auroc for name, found in sets.items()},
            "auroc_ci95": {name: found.auroc_ci95 for name, found in sets.items()},
            "aupr": {
                name: {"value": found.aupr, "base_rate": self.outliers[name].base_rate}
                for name, found in sets.items()
            },
            "fpr95": {name: found.fpr95 for name, found in sets.items()},
        }


def evaluate(
    detector: Detector,
    normal: Source,
    outliers: Mapping[str, Source],
    *,
    masks: Mapping[str, Path] | None = None,
    alpha: float | None = None,
    fdr: float | None = None,
    base_rate: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    labelling: Labelling | None = None,
    baseline: Baseline | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Evaluated:
    """Score normal images and sets of outliers, and compare.

    Args:
        detector: the bundle.
        normal: images that should not be flagged.
        outliers: name of set -> images that should be.
        masks: `Item.source` of an outlier -> the image that marks its unusual pixels.
        alpha: rate of false alarms; None takes the bundle's default.
        fdr: false discovery rate of the simulated batches; None takes 0.1, or the smallest that
            the calibration set allows.
        base_rate: the share of outliers that AUPR is stated for; None takes each set's own.
        limit: take a random sample of this many images of each set.
        seed: of those samples, and of the batches.
        labelling: what is asked of labels, from `Detector.labelling`; then the normal images have
            classes. None measures no labels.
        baseline: a classifier to measure beside the bundle, with `labelling` alone.
        progress: called with the number of images done.

    Raises:
        SourceError: a set with nothing readable in it, or more than 1 % of it seen before; with
            `labelling` a normal image without a class, or of one that the bundle does not know.
        AlphaUnreachable: an alpha, or an fdr, that the calibration set is too small for.
        UsageError: an alpha, fdr or base rate outside (0, 1), a limit below 1.
    """
    level = detector.alpha(alpha)
    q = _false_discovery_rate(detector, fdr)
    if base_rate is not None and not 0 < base_rate < 1:
        raise UsageError(f"--base-rate must lie between 0 and 1, not {base_rate:g}; try 0.01")
    has_maps = "nll_map" in detector.session.outputs
    marks = masks if masks and has_maps else None

    def read(reading: _Reading, name: str, source: Source) -> _Reading:
        items = sample(source, limit, seed)
        for slab in scored(
            detector.session,
            detector.spec,
            items,
            texture=detector.texture,
            hashes=True,
            nll_map=marks is not None,
        ):
            reading.add(slab)
            progress(len(slab.items))
        reading.check(f"{name} {source.name}")
        return reading

    asked = None if labelling is None else _Asked(level, labelling, baseline)
    usual = read(_Reading(detector, strange=False, masks=marks, asked=asked), NORMAL, normal)
    found = {
        name: read(_Reading(detector, strange=True, masks=marks, asked=asked), name, source)
        for name, source in outliers.items()
    }
    normals, samples = usual.sample(), {name: each.sample() for name, each in found.items()}
    verdict = detector.manifest.score_name
    if detector.labels:
        batches = discoveries_given(
            normals.p_values, {name: each.p_values for name, each in samples.items()}, q, seed=seed
        )
    else:
        batches = discoveries(
            detector.calibration.scores,
            normals.scores[verdict],
            {name: each.scores[verdict] for name, each in samples.items()},
            detector.calibration.p_table,
            q,
            seed=seed,
        )

    def compared(name: str) -> OutlierSet:
        strange = samples[name]
        rate = base_rate or len(strange) / (len(normals) + len(strange))
        scores = {
            score: separation(normals.scores[score], values, rate)
            for score, values in strange.scores.items()
        }
        told = telltale(usual.headers, found[name].headers)
        pixels = (found[name].pixels + usual.pixels).localisation()
        return OutlierSet(strange, rate, scores, batches[name], told, pixels)

    sets = {name: compared(name) for name in samples}
    smallest = conformal.smallest_alpha(detector.calibrated_on, detector.confidence)
    alphas = sorted({level, *(each for each in ALPHAS if each >= smallest)})
    unfamiliar = sum(each.unfamiliar for each in (usual, *found.values()))
    levels = [_level(detector, each, normals, samples) for each in alphas]
    return Evaluated(
        bundle=detector.manifest.name,
        score=verdict,
        likelihood=detector.manifest.likelihood,
        bits_per_dim=usual.bits_per_dim(),
        alpha=level,
        fdr=q,
        levels=levels,
        normal=normals,
        outliers=sets,
        localisation=sum((each.pixels for each in found.values()), usual.pixels).localisation(),
        seen={NORMAL: usual.seen, **{name: each.seen for name, each in found.items()}},
        unreadable=[error for each in (usual, *found.values()) for error in each.unreadable],
        warnings=[
            *_doubts(levels[alphas.index(level)], sets),
            *_unlocalised(masks, found, has_maps=has_maps),
            *filter(None, [detector.size_warning(unfamiliar)]),
        ],
        classification=None if asked is None else _classification(detector, asked, usual, found),
    )


def sample(source: Source, limit: int | None, seed: int) -> Iterator[Item]:
    """A random sample of a source without replacement, in its order, read as it goes by.

    Args:
        source: the images.
        limit: how many; None, or more than there are, takes all.
        seed: the same seed takes the same images.

    Raises:
        UsageError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}")
    count = len(source)
    if limit is None or limit >= count:
        return iter(source)
    chosen = np.random.default_rng(seed).choice(count, limit, replace=False)
    return _picked(source, np.sort(chosen).tolist())


def _picked(source: Source, places: list[int]) -> Iterator[Item]:
    remaining = iter(places)
    wanted = next(remaining, None)
    for place, item in enumerate(source):
        if place == wanted:
            yield item
            wanted = next(remaining, None)
            if wanted is None:
                return


class Baseline:
    """A softmax classifier, run on the same images as the bundle.

    Args:
        bundle: a classifier of the same images and classes.
        detector: the bundle that is evaluated.
        device: as for `Detector.load`.

    Raises:
        BundleError: it is no classifier, or of other images or classes.
    """

    def __init__(self, bundle: Bundle, detector: Detector, *, device: str = "auto") -> None:
        theirs, ours = bundle.manifest, detector.manifest
        for what, found, wanted in (
            ("kind", theirs.kind, "classifier"),
            ("image", theirs.image, ours.image),
            ("classes", theirs.classes, ours.classes),
        ):
            if found != wanted:
                raise BundleError(
                    f"--baseline {bundle.path}: its {what} is {found}, not {wanted}; give a "
                    "classifier trained on the same images and classes"
                )
        self.name = theirs.name
        self._session = open_session(bundle, device=device)

    def said(self, images: NDArray[np.uint8]) -> Said:
        """What it says of images (N, H, W, C): it calls none novel or ambiguous."""
        posterior = np.exp(
            cast("Floats", self._session.run(images).log_posterior), dtype=np.float64
        )
        none = np.zeros(len(images), np.bool_)
        return Said(posterior, np.ones(len(images)), none, none, posterior > 1)


@dataclass(frozen=True)
class _Asked:
    """What is asked of labels."""

    alpha: float
    labelling: Labelling
    baseline: Baseline | None


def _classification(
    detector: Detector, asked: _Asked, usual: _Reading, found: Mapping[str, _Reading]
) -> Classification:
    baseline = None
    if asked.baseline is not None:
        others = {name: _joined(reading.baseline) for name, reading in found.items()}
        baseline = (asked.baseline.name, _joined(usual.baseline), others)
    return classification(
        _joined(usual.said),
        np.array(usual.truth, np.intp),
        {name: _joined(reading.said) for name, reading in found.items()},
        classes=detector.classes,
        counts=cast("NDArray[np.int64]", detector.calibration.class_counts),
        alpha=asked.alpha,
        label_alpha=asked.labelling.label_alpha,
        confidence=detector.confidence,
        approximate=detector.manifest.likelihood != "exact",
        baseline=baseline,
    )


def _joined(parts: list[Said]) -> Said:
    return Said(
        *(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Said))
    )


class _Reading:
    """One set while it is read; images that training or calibration has seen count nowhere.

    Attributes:
        seen: their names.
        unreadable: (name, reason) of what could not be read.
        headers: one an image.
        pixels: those of normal images, or of the outliers that have a mask.
        masked, maskless: outliers with a mask and without.
        truth: the classes of normal images, and
        said, baseline: what is said of all, where labels are measured.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        strange: bool,
        masks: Mapping[str, Path] | None,
        asked: _Asked | None = None,
    ) -> None:
        self._detector = detector
        self._asked = asked
        self.truth: list[int] = []
        self.said: list[Said] = []
        self.baseline: list[Said] = []
        self._strange = strange
        self._masks = masks
        calibration = detector.calibration
        self._known = np.concatenate([calibration.training_hashes, calibration.calibration_hashes])
        self._judged: list[Judged] = []
        self._scores: list[dict[str, Floats]] = []
        self._extremes: list[tuple[float, Item]] = []
        self.seen: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.headers: list[Header] = []
        self.pixels = PixelCounts()
        self.masked = self.maskless = self.unfamiliar = 0

    def add(self, slab: Slab) -> None:
        """Take what is needed of a slab."""
        self.unreadable += [
            (item_name(slab.items[place]), str(why)) for place, why in slab.errors.items()
        ]
        if slab.raw is None:
            return
        items = [slab.items[place] for place in slab.readable]
        new = ~np.isin(slab.hashes, self._known)
        self.seen += [item_name(items[i]) for i in np.flatnonzero(~new)]
        rows = np.flatnonzero(new).tolist()
        if not rows:
            return
        raw = slab.raw[new]
        judged = self._detector.columns(raw, self._detector.manifest.default_alpha)
        self._judged.append(judged)
        self.unfamiliar += self._detector.unfamiliar(raw)
        self._scores.append(_all_scores(self._detector, raw, judged))
        self._keep_extremes(judged.score, [items[i] for i in rows])
        self.headers += [read_header(items[i].payload) for i in rows]
        if self._asked is not None:
            self._label(self._asked, slab, raw, judged.p_value, rows)
        if self._masks is not None:
            maps = maps_of(slab)
            for i in rows:
                self._count_pixels(items[i], maps[i])

    def check(self, subject: str) -> None:
        """Refuse a set that is none, or not a test set.

        Raises:
            SourceError: nothing readable in it, or more than 1 % of it seen before.
        """
        count = len(self.headers) + len(self.seen)
        if count == 0:
            raise SourceError(f"{subject}: {none_readable(self.unreadable)}")
        if len(self.seen) > SEEN_LIMIT * count:
            raise SourceError(
                f"{subject}: {len(self.seen)} of {count} images were seen in training or "
                f"calibration, such as {self.seen[0]}, and at most 1 % may be; give images kept "
                "apart"
            )

    def sample(self) -> Sample:
        """The numbers of every image and the items of a few."""
        scores = {
            name: np.concatenate([part[name] for part in self._scores]) for name in self._scores[0]
        }
        p_values = np.concatenate([part.p_value for part in self._judged])
        return Sample(scores, p_values, [item for _, item in self._extremes])

    def bits_per_dim(self) -> float:
        """Their mean."""
        return float(np.mean(np.concatenate([part.bits_per_dim for part in self._judged])))

    def _label(
        self, asked: _Asked, slab: Slab, raw: Raw, p_value: Floats, rows: list[int]
    ) -> None:
        """Take what is said of labels."""
        detector = self._detector
        labelled = cast("Labelled", detector.columns(raw, asked.alpha, asked.labelling).labelled)
        credible = bayes.credible(
            labelled.posterior,
            cast("Floats", detector.calibration.label_scores),
            asked.labelling.label_alpha,
        )
        self.said.append(
            Said(labelled.posterior, p_value, labelled.novel, labelled.ambiguous, credible)
        )
        if asked.baseline is not None:
            self.baseline.append(asked.baseline.said(np.asarray(slab.pixels)[rows]))
        if self._strange:
            return
        items = [slab.items[slab.readable[i]] for i in rows]
        self.truth += [detector.class_of(item_name(item), item.label) for item in items]

    def _keep_extremes(self, score: Floats, items: list[Item]) -> None:
        rank = score if self._strange else -score
        new = zip(rank.tolist(), items, strict=True)
        self._extremes = heapq.nsmallest(SHOWN, [*self._extremes, *new], key=lambda pair: pair[0])

    def _count_pixels(self, item: Item, values: NDArray[np.float32]) -> None:
        if not self._strange:
            self.pixels.add(values)
            return
        path = (self._masks or {}).get(item.source)
        if path is None:
            self.maskless += 1
            return
        try:
            height, width = values.shape
            self.pixels.add(values, to_mask(path, self._detector.spec, (height, width)))
        except ImageError as error:
            self.unreadable.append((str(path), str(error)))
            self.maskless += 1
        else:
            self.masked += 1


def _all_scores(detector: Detector, raw: Raw, judged: Judged) -> dict[str, Floats]:
    """The verdict's score, the plain likelihood and every statistic, by name."""
    statistics = {
        name: finite(raw.statistics[:, column].astype(np.float64))
        for column, name in enumerate(detector.manifest.statistics)
    }
    verdict = detector.manifest.score_name
    return {verdict: judged.score} | {
        name: values
        for name, values in {"nll": detector.nll(raw), **statistics}.items()
        if name != verdict
    }


def _level(
    detector: Detector, alpha: float, normal: Sample, outliers: Mapping[str, Sample]
) -> Level:
    # By class the promise holds for the images of each, and the widest band holds all of them.
    sizes = {len(scores) for scores, _ in detector.calibration.per_class()}
    low, high = max(
        (
            conformal.false_alarm_band(alpha, n, len(normal), confidence=detector.confidence)
            for n in sizes
        ),
        key=lambda band: band[1],
    )
    return Level(
        alpha,
        float(np.mean(normal.p_values <= alpha)),
        (0.0 if detector.labels else low, high),
        {name: Proportion.of(each.p_values <= alpha) for name, each in outliers.items()},
    )


def _false_discovery_rate(detector: Detector, asked: float | None) -> float:
    n, confidence = detector.calibrated_on, detector.confidence
    if asked is None:
        return max(FDR, conformal.smallest_alpha(n, confidence))
    return conformal.check_alpha(asked, n, confidence, what="--fdr")


def _doubts(level: Level, sets: Mapping[str, OutlierSet]) -> Iterator[str]:
    """What makes the numbers say less than they seem to."""
    if level.observed > level.band[1]:
        yield (
            f"false alarms at {level.alpha:g} are {level.observed:.4f}, where a promise that "
            f"holds gives at most {level.band[1]:.4f}: these normal images are not like the "
            "calibration images; calibrate on such images"
        )
    for name, found in sets.items():
        if found.telltale.suspicious:
            yield (
                f"{name}: {found.telltale.feature} alone tells these outliers with AUROC "
                f"{found.telltale.auroc:.3f}, without a look at the pixels; a score may do well "
                "by traces of that"
            )


def _unlocalised(
    masks: Mapping[str, Path] | None, found: Mapping[str, _Reading], *, has_maps: bool
) -> Iterator[str]:
    """Why masks are not used."""
    if masks and not has_maps:
        yield "the bundle has no per-pixel map (nll_map), so the masks are not used"
    for name, reading in found.items():
        if reading.masked and reading.maskless:
            yield (
                f"{name}: {reading.maskless} of {len(reading.headers)} images have no mask and "
                "count in no pixel measure"
            )


def _rounded(value: Any) -> Any:
    """The same structure with floats that people can read."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
