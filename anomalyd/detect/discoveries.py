"""Whether flags at a false discovery rate keep it: batches drawn again and again.

Conformal p-values of one batch share their calibration set, and the promise is an average over
calibration sets: so each split draws a new one from calibration and normal test scores pooled,
and a batch of what is left with outliers among it. That pool is exchangeable by construction.
Whether test images are exchangeable with the calibration images, the rate of false alarms says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anomalyd.detect import conformal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["SHARE", "SPLITS", "Discoveries", "discoveries", "discoveries_given"]

SHARE = 0.1  # of outliers in a batch
SPLITS = 200


@dataclass(frozen=True)
class Discoveries:
    """What Benjamini-Hochberg flagged in batches with one set of outliers.

    Attributes:
        batch: images of a batch.
        outliers: of them.
        mean_fdp: mean share of the flags that were false, 0 for a batch without flags.
        standard_error: of that mean.
        power: mean share of the outliers that were flagged.
    """

    batch: int
    outliers: int
    mean_fdp: float
    standard_error: float
    power: float


def discoveries(
    calibration: Floats,
    normal: Floats,
    outliers: Mapping[str, Floats],
    p_table: Floats,
    q: float,
    *,
    share: float = SHARE,
    splits: int = SPLITS,
    seed: int = 0,
) -> dict[str, Discoveries]:
    """Realised false discovery proportions over random splits.

    Args:
        calibration: float64 (n,), scores of the calibration split.
        normal: float64 (N,), scores of normal test images.
        outliers: name of set -> float64 (M,), scores.
        p_table: float64 (n + 1,), as `conformal.p_table` makes it.
        q: the false discovery rate, in (0, 1).
        share: of outliers in a batch, in (0, 1); a batch takes all N normals, or as many as the
            set has outliers for.
        splits: how many, at least 2.
        seed: of the splits.

    Returns:
        name of set -> what was found.
    """
    pool, n = np.concatenate([calibration, normal]), len(calibration)

    def split(rng: np.random.Generator) -> tuple[Floats, Callable[[Floats], Floats]]:
        mixed = rng.permutation(pool)
        ranked = np.sort(mixed[:n])
        return mixed[n:], lambda scores: conformal.p_values(scores, ranked, p_table)

    return _simulated(split, len(normal), outliers, q, share, splits, seed)


def discoveries_given(
    normal: Floats,
    outliers: Mapping[str, Floats],
    q: float,
    *,
    share: float = SHARE,
    splits: int = SPLITS,
    seed: int = 0,
) -> dict[str, Discoveries]:
    """The same from p-values, by the calibration set that there is: only batches are drawn.

    Of the normal images each takes a half, or no two batches would differ in them. For verdicts
    that rest on calibration class by class, where normal images without a class cannot be pooled.

    Args:
        normal: float64 (N,), p-values of normal test images.
        outliers: name of set -> float64 (M,), p-values.
        q, share, splits, seed: as for `discoveries`.
    """

    def split(rng: np.random.Generator) -> tuple[Floats, Callable[[Floats], Floats]]:
        return rng.permutation(normal), lambda p_values: p_values

    return _simulated(split, -(-len(normal) // 2), outliers, q, share, splits, seed)


def _simulated(
    split: Callable[[np.random.Generator], tuple[Floats, Callable[[Floats], Floats]]],
    normals: int,
    outliers: Mapping[str, Floats],
    q: float,
    share: float,
    splits: int,
    seed: int,
) -> dict[str, Discoveries]:
    rng = np.random.default_rng(seed)
    false_share: dict[str, list[float]] = {name: [] for name in outliers}
    caught: dict[str, list[float]] = {name: [] for name in outliers}
    sizes = {name: _sizes(normals, len(scores), share) for name, scores in outliers.items()}
    for _ in range(splits):
        rest, p_values = split(rng)
        for name, scores in outliers.items():
            usual, strange = sizes[name]
            batch = np.concatenate([rest[:usual], rng.choice(scores, strange, replace=False)])
            flagged = conformal.benjamini_hochberg(p_values(batch)) <= q
            false_share[name].append(flagged[:usual].sum() / max(1, flagged.sum()))
            caught[name].append(flagged[usual:].mean())
    return {
        name: Discoveries(
            batch=sum(sizes[name]),
            outliers=sizes[name][1],
            mean_fdp=float(np.mean(found)),
            standard_error=float(np.std(found, ddof=1) / math.sqrt(splits)),
            power=float(np.mean(caught[name])),
        )
        for name, found in false_share.items()
    }


def _sizes(normals: int, outliers: int, share: float) -> tuple[int, int]:
    """Normal images and outliers of a batch, at least one of each."""
    strange = min(outliers, max(1, round(normals * share / (1 - share))))
    return min(normals, max(1, round(strange * (1 - share) / share))), strange
