"""The two tables of a bundle: what makes scores into p-values, and what proves the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomalyd.detect import conformal
from anomalyd.detect.manifest import OUTPUTS, Manifest
from anomalyd.detect.npz import pack_arrays, unpack_arrays
from anomalyd.detect.statistics import BY_CLASS, BY_CODE, Fit
from anomalyd.errors import BundleError

__all__ = [
    "Calibration",
    "Golden",
    "pack_calibration",
    "pack_golden",
    "unpack_calibration",
    "unpack_golden",
]

SLACK = 1e-3
"""How far float32 posteriors may be from summing to 1."""
ROUNDING = 1e-6
"""How far below its confidence a p-value may hold, for whoever computes quantiles otherwise."""

_CALIBRATION = {
    "fit_nll": ("<f8", 1),
    "fit_statistics": ("<f4", 2),
    "scores": ("<f8", 1),
    "p_table": ("<f8", 1),
    "training_hashes": ("<u8", 1),
    "calibration_hashes": ("<u8", 1),
}
_TILED = {"tiles": ("<i8", 1)}  # where images are scored in tiles, too
_BY_CODE = {"fit_codes": ("<f4", 2)}  # where the score compares codes, too
_BY_CLASS = {  # where verdicts have labels, too
    "fit_labels": ("<i8", 1),
    "class_counts": ("<i8", 1),
    "label_scores": ("<f8", 1),
}
_GOLDEN = {
    "images": ("|u1", 4),
    "log_likelihood": ("<f8", 2),
    "log_posterior": ("<f4", 2),
    "embedding": ("<f4", 2),
    "statistics": ("<f4", 2),
}


@dataclass(frozen=True, eq=False)
class Calibration:
    """What turns raw scores into p-values, the content of `calibration.npz`.

    Where there is no density, there are the hashes alone: `hashes_alone` makes such a table.

    Attributes:
        fit_nll: float64 (m,), nats, ascending: -log-likelihood of the fit split.
        fit_statistics: float32 (m, S): the graph's statistics on the fit split, row by row of
            the same images (scores of the likelihood alone do without that order).
        scores: float64 (n,), ascending: verdict scores of the calibration split.
        p_table: float64 (n + 1,), strictly increasing in (0, 1]; the p-value of a score s is
            p_table[number of calibration scores >= s].
        training_hashes: uint64, ascending: images of train, validation and fit split.
        calibration_hashes: uint64, ascending: images of the calibration split.
        tiles: int64 (n,), ascending: how many tiles the calibration images have; None where
            images are not tiled.
        fit_codes: float32 (m, E): the encoder's features of the fit split; None where the score
            does without.
        fit_labels: int64 (m,): classes of the fit split; None, like all that follows, where
            verdicts have no labels.
        class_counts: int64 (K,), calibration images n_y of each class. `scores` then holds those
            of class 0, ascending, then those of class 1, and so on, and `p_table`
            K tables of n_y + 1 entries.
        label_scores: float64 (n,), ascending: 1 - p(true label|x) of the calibration split.
    """

    fit_nll: NDArray[np.float64]
    fit_statistics: NDArray[np.float32]
    scores: NDArray[np.float64]
    p_table: NDArray[np.float64]
    training_hashes: NDArray[np.uint64]
    calibration_hashes: NDArray[np.uint64]
    tiles: NDArray[np.int64] | None = None
    fit_codes: NDArray[np.float32] | None = None
    fit_labels: NDArray[np.int64] | None = None
    class_counts: NDArray[np.int64] | None = None
    label_scores: NDArray[np.float64] | None = None

    @property
    def fit(self) -> Fit:
        """The fit split, as scores take it."""
        return Fit(self.fit_nll, self.fit_statistics, self.fit_codes, self.fit_labels)

    def threshold(self, alpha: float) -> float | None:
        """What a score must exceed to be an outlier at alpha to every class; None: none can.

        With classes an image below it can be one, too: where most classes are unlikely.
        """
        found = []
        for scores, table in self.per_class():
            rank = int(np.searchsorted(table, alpha, side="right"))
            if not rank:
                return None
            found.append(float(scores[max(0, len(scores) - rank)]))
        return max(found)

    def per_class(self) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """`scores` and `p_table` of each class; of all images where there are none."""
        if self.class_counts is None:
            return [(self.scores, self.p_table)]
        ends = np.cumsum(self.class_counts)[:-1]
        tables = np.split(self.p_table, ends + np.arange(1, len(ends) + 1))
        return list(zip(np.split(self.scores, ends), tables, strict=True))

    @cached_property
    def levels(self) -> NDArray[np.float64]:
        """Every p-value that an image can have, ascending."""
        return np.unique(self.p_table)

    @property
    def smallest(self) -> float:
        """The smallest p-value that every class can give."""
        return max(float(table[0]) for _, table in self.per_class())

    @staticmethod
    def by_nll(
        nll: NDArray[np.float64],
        statistics: NDArray[np.float32],
        codes: NDArray[np.float32] | None = None,
        labels: NDArray[np.int64] | None = None,
    ) -> dict[str, Any]:
        """The arrays of a fit split, in ascending order of nll."""
        order = np.argsort(nll, kind="stable")
        given: dict[str, NDArray[Any] | None] = {
            "fit_nll": nll,
            "fit_statistics": statistics,
            "fit_codes": codes,
            "fit_labels": labels,
        }
        return {key: rows[order] for key, rows in given.items() if rows is not None}

    @staticmethod
    def hashes_alone(
        training_hashes: NDArray[np.uint64], calibration_hashes: NDArray[np.uint64]
    ) -> Calibration:
        """What a classifier or an autoencoder has: which images it has seen, and held out."""
        none = np.empty(0)
        fit_statistics = np.empty((0, 0), np.float32)
        return Calibration(none, fit_statistics, none, none, training_hashes, calibration_hashes)


@dataclass(frozen=True, eq=False)
class Golden:
    """Images and what the graph must say about them, the content of `golden.npz`.

    Attributes:
        images: uint8 (g, H, W, C), g >= 1.
        log_likelihood: float64 (g, K), nats; K is 0 where the kind is no density.
        statistics: float32 (g, S).
        log_posterior: float32 (g, K), nats: a classifier's.
        embedding: float32 (g, E): an autoencoder's.
    """

    images: NDArray[np.uint8]
    log_likelihood: NDArray[np.float64]
    statistics: NDArray[np.float32]
    log_posterior: NDArray[np.float32] | None = None
    embedding: NDArray[np.float32] | None = None


def pack_calibration(calibration: Calibration) -> bytes:
    """Bytes of `calibration.npz`; the same arrays always give the same bytes."""
    expected = dict(_CALIBRATION)
    for table in (_TILED, _BY_CODE, _BY_CLASS):
        expected |= {
            key: kind for key, kind in table.items() if getattr(calibration, key) is not None
        }
    return _pack(calibration, expected)


def pack_golden(golden: Golden) -> bytes:
    """Bytes of `golden.npz`; the same arrays always give the same bytes."""
    absent = {key for key in _GOLDEN if getattr(golden, key) is None}
    if not golden.log_likelihood.shape[1]:
        absent.add("log_likelihood")
    return _pack(golden, {key: _GOLDEN[key] for key in _GOLDEN if key not in absent})


def _pack(record: Calibration | Golden, expected: Mapping[str, tuple[str, int]]) -> bytes:
    return pack_arrays(
        {key: np.asarray(getattr(record, key), dtype) for key, (dtype, _) in expected.items()}
    )


def unpack_calibration(data: bytes, manifest: Manifest) -> Calibration:
    """Content of `calibration.npz`, held against its own rules and the manifest.

    Raises:
        BundleError: naming the array, the rule and what was found.
    """
    tiled = manifest.image.tiled and manifest.kind == "density"
    by_class = manifest.score_name == BY_CLASS
    by_code = manifest.score_name == BY_CODE or (by_class and "embedding" in manifest.outputs)
    expected = dict(_CALIBRATION)
    for table, there in ((_TILED, tiled), (_BY_CODE, by_code), (_BY_CLASS, by_class)):
        expected |= table if there else {}
    calibration = Calibration(**unpack_arrays(data, expected, "calibration.npz"))
    _refuse_broken("calibration.npz", _calibration_rules(calibration, manifest))
    return calibration


def unpack_golden(data: bytes, manifest: Manifest) -> Golden:
    """Content of `golden.npz`, held against the manifest.

    Raises:
        BundleError: naming the array, the rule and what was found.
    """
    keys = ("images", OUTPUTS[manifest.kind][0], "statistics")
    arrays = unpack_arrays(data, {key: _GOLDEN[key] for key in keys}, "golden.npz")
    golden = Golden(**{"log_likelihood": np.empty((len(arrays["images"]), 0)), **arrays})
    _refuse_broken("golden.npz", _golden_rules(golden, manifest))
    return golden


# Rules are pairs (holds, text). They come from generators, so that a rule may rely on the ones
# before it.
_Rules = Iterator[tuple[bool | np.bool, str]]


def _refuse_broken(what: str, rules: Iterable[tuple[bool | np.bool, str]]) -> None:
    for holds, text in rules:
        if not holds:
            raise BundleError(f"{what}: {text}; export the bundle again")


def _calibration_rules(c: Calibration, manifest: Manifest) -> _Rules:
    for key in ("fit_nll", "fit_statistics", "scores", "p_table"):
        yield np.isfinite(getattr(c, key)).all(), f"{key} must be finite"
    ascending = ["fit_nll", "training_hashes", "calibration_hashes"]
    ascending += ["scores"] if c.class_counts is None else ["label_scores"]
    for key in ascending:
        array = getattr(c, key)
        yield (array[1:] >= array[:-1]).all(), f"{key} must be sorted in ascending order"
    if manifest.kind == "density":
        yield from _conformal_rules(c, manifest)
        return
    for key in ("fit_nll", "fit_statistics", "scores", "p_table"):
        yield not getattr(c, key).size, f"{key} must be empty where kind is {manifest.kind}"


def _conformal_rules(c: Calibration, manifest: Manifest) -> _Rules:
    n, width = len(c.scores), len(manifest.statistics)
    stated, alpha = manifest.calibration_n, manifest.default_alpha
    yield len(c.fit_nll) >= 1, "fit_nll must not be empty"
    yield _is_shape("fit_statistics", c.fit_statistics, (len(c.fit_nll), width))
    if c.fit_codes is not None:
        rows = len(c.fit_codes)
        yield rows == len(c.fit_nll), f"fit_codes must have {len(c.fit_nll)} rows, not {rows}"
        yield np.isfinite(c.fit_codes).all(), "fit_codes must be finite"
    yield n == stated, f"scores holds {n} where manifest.json says calibration_n {stated}"
    if c.class_counts is None:
        yield _is_shape("p_table", c.p_table, (n + 1,))
    else:
        yield from _class_rules(c, len(manifest.classes or ()))
    if c.tiles is not None:
        yield _is_shape("tiles", c.tiles, (n,))
        yield (c.tiles[1:] >= c.tiles[:-1]).all(), "tiles must be sorted in ascending order"
        yield c.tiles[0] >= 1, "tiles must be at least 1"
    for scores, table in c.per_class():
        smallest, count = table[0], len(scores)
        rises = smallest > 0 and (table[1:] > table[:-1]).all() and table[-1] <= 1
        yield rises, "p_table must increase strictly within (0, 1]"
        if manifest.guarantee["kind"] == "marginal":
            ranks = np.arange(1, count + 2) / (count + 1)
            fine = (np.abs(table - ranks) <= 1e-12).all()
            yield fine, "a marginal p_table must be r / (n + 1)"
        else:
            yield table[-1] == 1, f"a conditional p_table must end with 1, not {table[-1]:g}"
            yield _holds(table, manifest.guarantee["confidence"])
        yield (
            alpha >= smallest * (1 - 1e-12),
            f"the smallest p-value is {smallest:g}, so at default_alpha {alpha:g} nothing is "
            "flagged",
        )


def _holds(table: NDArray[np.float64], confidence: float | None) -> tuple[bool, str]:
    found = conformal.confidences(table)
    worst = int(found.argmin())
    return confidence is not None and found[worst] >= confidence - ROUNDING, (
        f"a conditional p_table must hold with the confidence {confidence} of its guarantee: "
        f"rank {worst + 1} of {len(found)} holds with {found[worst]:.6g}"
    )


def _class_rules(c: Calibration, classes: int) -> _Rules:
    """Rules of a table by class; the arrays are there."""
    labels, counts, truths = c.fit_labels, c.class_counts, c.label_scores
    if labels is None or counts is None or truths is None:
        yield False, f"{', '.join(_BY_CLASS)} must all be there"
        return
    n, m = len(c.scores), len(c.fit_nll)
    yield _is_shape("class_counts", counts, (classes,))
    yield (counts >= 1).all() and counts.sum() == n, "class_counts must be 1 or more, and sum to n"
    yield _is_shape("p_table", c.p_table, (n + classes,))
    yield _is_shape("fit_labels", labels, (m,))
    known = (labels >= 0) & (labels < classes)
    yield known.all(), f"fit_labels must lie in 0..{classes - 1}"
    yield _is_shape("label_scores", truths, (n,))
    yield ((truths >= 0) & (truths <= 1)).all(), "label_scores must lie in 0..1"
    for scores, _ in c.per_class():
        yield (scores[1:] >= scores[:-1]).all(), "scores must be sorted within each class"


def _golden_rules(g: Golden, manifest: Manifest) -> _Rules:
    image, count = manifest.image, len(g.images)
    main = OUTPUTS[manifest.kind][0]
    array = getattr(g, main)
    columns = len(manifest.classes) if manifest.classes else max(1, array.shape[1])
    yield count >= 1, "images must not be empty"
    yield _is_shape("images", g.images, (count, image.height, image.width, image.channels))
    yield _is_shape(main, array, (count, columns))
    yield _is_shape("statistics", g.statistics, (count, len(manifest.statistics)))
    for key in (main, "statistics"):
        yield np.isfinite(getattr(g, key)).all(), f"{key} must be finite"
    if main == "log_posterior":
        yield (array <= SLACK).all(), f"{main} must be at most 0, the log of a probability"
        total = np.exp(array.astype(np.float64)).sum(axis=1)
        yield (np.abs(total - 1) <= SLACK).all(), f"{main}: the probabilities must sum to 1"


def _is_shape(key: str, array: NDArray[Any], shape: tuple[int, ...]) -> tuple[bool, str]:
    return array.shape == shape, f"{key} must have the shape {shape}, not {array.shape}"
