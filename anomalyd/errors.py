"""Every error a user can cause, in one tree.

    AnomalydError                 exit code 1
    ├── UsageError                exit code 2   a wrong flag, setting or name
    ├── MissingExtra                            an optional dependency is not installed
    ├── SourceError                             a DATA or PATH argument that cannot be read
    ├── ImageError                              one bad image: `reason` (metrics), `status` (HTTP)
    │   ├── EmptyImage            400
    │   ├── TooManyBytes          413
    │   ├── TooManyPixels         413
    │   ├── FormatNotAllowed      415
    │   ├── AnimatedImage         415
    │   ├── CorruptImage          422
    │   └── WrongSize             422
    ├── BundleError                             a bundle that is broken, hostile or too new
    ├── AlphaUnreachable                        alpha below what the calibration size allows
    ├── CalibrationError                        calibration data that would void the promise
    ├── TrainingError                           training that cannot start or go on
    └── ExportError                             a graph that does not reproduce the model

A message names the subject, the rule, the actual value and the way out, on one line.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AlphaUnreachable",
    "AnimatedImage",
    "AnomalydError",
    "BundleError",
    "CalibrationError",
    "CorruptImage",
    "EmptyImage",
    "ExportError",
    "FormatNotAllowed",
    "ImageError",
    "MissingExtra",
    "SourceError",
    "TooManyBytes",
    "TooManyPixels",
    "TrainingError",
    "UsageError",
    "WrongSize",
    "printable",
]


def printable(text: str) -> str:
    """Text as a terminal shows it: what a file name may hold beyond that, escaped."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


class AnomalydError(Exception):
    """What anomalyd raises on purpose; the command line prints it as one line and exits."""

    exit_code: ClassVar[int] = 1


class UsageError(AnomalydError):
    """A flag, setting, name or combination that cannot be meant."""

    exit_code = 2


class MissingExtra(AnomalydError):
    """A function needs a package that only an extra installs."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'anomalyd[{extra}]'")
        self.package = package
        self.extra = extra


class SourceError(AnomalydError):
    """A DATA or PATH argument that does not exist, holds nothing readable or is ambiguous."""


class ImageError(AnomalydError):
    """One image that cannot be scored.

    Attributes:
        reason: a slug from a fixed set, for metric labels.
        status: the HTTP status that the daemon answers with.
    """

    reason: ClassVar[str] = "image"
    status: ClassVar[int] = 422


class EmptyImage(ImageError):
    """No bytes at all."""

    reason = "empty"
    status = 400


class TooManyBytes(ImageError):
    """More encoded bytes than the budget allows."""

    reason = "too_many_bytes"
    status = 413


class TooManyPixels(ImageError):
    """A header that declares more pixels than the budget allows; nothing was decoded."""

    reason = "too_many_pixels"
    status = 413


class FormatNotAllowed(ImageError):
    """Magic bytes of a format that is not on the allow-list (vector formats among them)."""

    reason = "format"
    status = 415


class AnimatedImage(ImageError):
    """More than one frame: which one is meant is not ours to guess."""

    reason = "animated"
    status = 415


class CorruptImage(ImageError):
    """Truncated or damaged data."""

    reason = "corrupt"


class WrongSize(ImageError):
    """A size, aspect ratio or channel count that the bundle's policy refuses."""

    reason = "wrong_size"


class BundleError(AnomalydError):
    """A bundle that is incomplete, altered, hostile, or of a newer format."""


class AlphaUnreachable(AnomalydError):
    """An alpha, or a false discovery rate, that the calibration set is too small for."""


class CalibrationError(AnomalydError):
    """Calibration data that would void the promise (too few, already seen in training)."""


class TrainingError(AnomalydError):
    """Training that cannot start or cannot go on."""


class ExportError(AnomalydError):
    """An exported graph that does not reproduce the model it came from."""
