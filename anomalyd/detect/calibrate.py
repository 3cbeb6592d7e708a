"""Recalibration: a bundle's promise redone on someone's own normal images, without torch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from anomalyd.detect import conformal
from anomalyd.detect.bundle import Calibration, Guarantee, pack_calibration, write_bundle
from anomalyd.detect.card import recalibrated
from anomalyd.detect.detector import Detector
from anomalyd.detect.pipeline import Collected, collect, none_readable
from anomalyd.detect.ranks import ranks, ranks_by_class
from anomalyd.errors import CalibrationError, ImageError, SourceError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anomalyd.sources import Source

__all__ = ["Calibrated", "calibrate", "calibration_half"]

FEWEST = 10  # images to calibrate on, or to fit on: fewer give no ranks worth the name


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate` did.

    Attributes:
        n: calibration images.
        fitted: images in the new fit split; 0 where the old one was kept.
        seen: names of images refused because training has seen them.
        repeated: images among the n that are copies of another.
        unreadable: (name, reason) of what could not be read.
        default_alpha: the bundle's new default.
        smallest_alpha: the smallest alpha that can be asked for from now on.
        needed: calibration images that an alpha of 0.01 takes, of each class where verdicts have
            labels.
        confidence: of the guarantee; None for the marginal one.
    """

    n: int
    fitted: int
    seen: list[str]
    repeated: int
    unreadable: list[tuple[str, str]]
    default_alpha: float
    smallest_alpha: float
    needed: int
    confidence: float | None


def calibrate(
    path: str | Path,
    source: Source,
    *,
    confidence: float | None = None,
    alpha: float | None = None,
    refit: bool = False,
    device: str = "auto",
    progress: Callable[[int], object] | None = None,
) -> Calibrated:
    """Rewrite a bundle's conformal table from normal images that its training has not seen.

    Args:
        path: the bundle, which is replaced whole or not at all.
        source: normal images; training images among them are refused one by one.
        confidence: C for "with confidence C over calibration sets"; None for "on average".
        alpha: the bundle's default from now on; None for 0.01, or the smallest that there is.
        refit: also renew what the fit split holds, from a half of the images that is then not
            used for calibration; groups, where the source has them, are never torn apart.
        device: as for `Detector.load`.
        progress: called with the number of images done.

    Raises:
        CalibrationError: fewer than 10 images are left, or, where verdicts have labels, of a
            class; an image without a class or of a class that the bundle does not know.
        SourceError: not one image can be read.
        BundleError: the bundle is broken or cannot be written.
        AlphaUnreachable: an alpha that takes more images than these.
        UsageError: a confidence outside (0, 1 - 1e-9], an alpha outside [1e-12, 1), a refit of a
            bundle that has a texture.
    """
    # What is wrong in itself is told before images are read.
    conformal.images_needed(conformal.DEFAULT_ALPHA if alpha is None else alpha, confidence)
    detector = Detector.load(path, device=device)
    if refit and detector.texture is not None:
        raise UsageError(
            f"--refit: bundle {path} scores photographs by a texture, which only training fits; "
            "calibrate without it, or train again"
        )
    errors: list[tuple[str, ImageError]] = []
    collected = collect(
        detector.session,
        detector.spec,
        source,
        texture=detector.texture,
        progress=progress,
        errors=errors,
    )
    if collected is None:
        raise SourceError(f"{source.name}: {none_readable(errors)}")
    trained = np.isin(collected.hashes, detector.calibration.training_hashes)
    seen = [collected.names[i] for i in np.flatnonzero(trained)]
    new = collected[~trained]
    if not len(new):
        raise CalibrationError(
            f"{source.name}: training has seen all {len(seen)} images; give normal images that "
            "were kept apart from it"
        )
    old = detector.calibration
    if refit:
        new, old = _refit(detector, new)
    n = len(new)
    judge = Detector(dataclasses.replace(detector.bundle, calibration=old), detector.session)
    calibration = dataclasses.replace(
        old,
        **_ranks(judge, new, confidence),
        calibration_hashes=np.sort(new.hashes),
        tiles=None if new.raw.tiles is None else np.sort(new.raw.tiles),
    )
    fewest = n if calibration.class_counts is None else int(calibration.class_counts.min())
    if fewest < FEWEST:
        of = "" if calibration.class_counts is None else " of its rarest class"
        raise CalibrationError(
            f"{source.name}: {fewest} images{of} are left to calibrate on, and {FEWEST} are "
            "needed; give more normal images"
        )
    if alpha is None:
        alpha = conformal.default_alpha(fewest, confidence)
    else:
        conformal.check_alpha(alpha, fewest, confidence)
    _write(detector, calibration, alpha, confidence, source.name)
    return Calibrated(
        n=n,
        fitted=len(old.fit_nll) if refit else 0,
        seen=seen,
        repeated=n - len(np.unique(new.hashes)),
        unreadable=[(name, str(error)) for name, error in collected.errors],
        default_alpha=alpha,
        smallest_alpha=conformal.smallest_alpha(fewest, confidence),
        needed=conformal.images_needed(conformal.DEFAULT_ALPHA, confidence),
        confidence=confidence,
    )


def calibration_half(hashes: NDArray[np.uint64], groups: list[str | None]) -> NDArray[np.bool_]:
    """Which images calibrate, the others being fitted on: about half, fixed by group or content.

    Args:
        hashes: uint64 (N,) content hashes; copies of an image fall into one half.
        groups: N groups, or None; a group falls into one half.

    Returns:
        bool (N,).
    """
    own = [
        int(content) if group is None else _hash(group)
        for content, group in zip(hashes, groups, strict=True)
    ]
    return np.array([value & 1 == 0 for value in own], np.bool_)


def _refit(detector: Detector, new: Collected) -> tuple[Collected, Calibration]:
    """The images left for calibration, and a calibration whose fit split is the other half."""
    kept = calibration_half(new.hashes, new.groups)
    # A copy in a group of its own would stand in both halves: it stays with the fit split.
    kept &= ~np.isin(new.hashes, new.hashes[~kept])
    fit, rest = new[~kept], new[kept]
    if min(len(fit), len(rest)) < FEWEST:
        raise CalibrationError(
            f"--refit leaves {len(fit)} images to fit and {len(rest)} to calibrate, and {FEWEST} "
            "each are needed; give more images, or more groups, or calibrate without --refit"
        )
    old, raw = detector.calibration, fit.raw
    labels = None
    if detector.labels:
        labels = _classes(detector, fit)
    codes = None if old.fit_codes is None else raw.embedding
    calibration = dataclasses.replace(
        old,
        **Calibration.by_nll(detector.nll(raw), raw.statistics, codes, labels),
        training_hashes=np.union1d(old.training_hashes, fit.hashes),
    )
    return rest, calibration


def _ranks(detector: Detector, new: Collected, confidence: float | None) -> dict[str, Any]:
    if not detector.labels:
        return ranks(detector.scores(new.raw), confidence)
    manifest = detector.manifest
    return ranks_by_class(
        detector.scores(new.raw),
        new.raw.log_likelihood,
        _classes(detector, new),
        classes=detector.classes,
        priors=manifest.priors,
        temperature=cast("float", manifest.temperature),
        doubt=manifest.doubt,
        confidence=confidence,
    )


def _classes(detector: Detector, images: Collected) -> NDArray[np.int64]:
    """The place of each image's class among the bundle's."""
    named = list(zip(images.names, images.labels, strict=True))
    try:
        return np.array([detector.class_of(name, label) for name, label in named], np.int64)
    except SourceError as error:
        raise CalibrationError(f"{error}; it is calibrated class by class") from None


def _write(
    detector: Detector,
    calibration: Calibration,
    alpha: float,
    confidence: float | None,
    source: str,
) -> None:
    bundle = detector.bundle
    guarantee = (
        Guarantee(kind="marginal", confidence=None)
        if confidence is None
        else Guarantee(kind="conditional", confidence=confidence)
    )
    manifest = dataclasses.replace(
        bundle.manifest,
        default_alpha=alpha,
        guarantee=guarantee,
        calibration_n=len(calibration.scores),
    )
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    files["calibration.npz"] = pack_calibration(calibration)
    files["CARD.md"] = recalibrated(
        files["CARD.md"].decode(errors="replace"),
        manifest,
        np.sort(calibration.scores),
        calibration.threshold(alpha),
        source,
    ).encode()
    write_bundle(bundle.path, manifest, files, replace=True)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
